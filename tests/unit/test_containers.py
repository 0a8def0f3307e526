"""Files of every kind are read row by row, whatever they are called; others are named for what they are."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from treg_megatron.data.pairs import read_pairs
from treg_megatron.data.records import read_rows
from treg_megatron.errors import UserError

ROWS = [{"prompt": f"Name a bird, {n}\n", "chosen": "Möwe", "rejected": 'a "bat"'} for n in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
COMPRESSED = {
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


def rows(path):
    return [row for _, row in read_rows(path)]


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def message(path):
    with pytest.raises(UserError) as error:
        rows(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


# -- compression -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json.gz", "pairs"])
@pytest.mark.parametrize("kind", COMPRESSED)
def test_compression_is_detected_from_the_content(tmp_path, kind, name):
    for text in (LINES, json.dumps(ROWS).encode()):
        assert rows(write(tmp_path / name, COMPRESSED[kind](text))) == ROWS


@pytest.mark.parametrize("kind", COMPRESSED)
def test_parts_that_were_joined_are_read_whole(tmp_path, kind):
    assert rows(write(tmp_path / "p", COMPRESSED[kind](LINES) * 2)) == ROWS * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPRESSED)
def test_an_archive_that_is_cut_off_says_after_which_row(tmp_path, kind):
    many = b"".join(json.dumps({"n": n, "noise": str(hash(str(n)))}).encode() + b"\n" for n in range(100_000))
    whole = COMPRESSED[kind](many)
    path, read = write(tmp_path / "p", whole[: len(whole) * 3 // 4]), []
    with pytest.raises(UserError) as error:
        read.extend(number for number, _ in read_rows(path))
    with pytest.raises(UserError):
        for number, _ in read_rows(path):
            read.append(number)
    assert len(read) > 10_000
    assert f"{path} cannot be read after row {read[-1]}: " in str(error.value) and "\n" not in str(error.value)


# -- other kinds of files ----------------------------------------------------------------------------------------------


def zipped(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), data)
    return stream.getvalue()


def tarred():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"), io.BytesIO())
    return stream.getvalue()


def saved(write_to):
    stream = io.BytesIO()
    write_to(stream)
    return stream.getvalue()


FOREIGN = {
    "zip": (zipped(a_jsonl=LINES), "is a zip archive: unpack it"),
    "cut-off zip": (zipped(a_jsonl=LINES)[:60], "is a zip archive: unpack it"),
    "torch": (zipped(archive__data_pkl=b""), "is a file that torch.save wrote: save its rows as JSONL"),
    "excel": (zipped(xl__workbook_xml=b""), "is an Excel workbook: save it as CSV"),
    "npz": (saved(lambda stream: np.savez(stream, a=np.zeros(2))), "is a NumPy archive"),
    "npy": (saved(lambda stream: np.save(stream, np.zeros(2))), "is a NumPy array"),
    "pickle": (pickle.dumps(ROWS), "is a pickle, which could run code on loading: save its rows as JSONL or Parquet"),
    "tar": (tarred(), "is a tar archive: unpack it"),
    "tar.gz": (gzip.compress(tarred()), "is a tar archive: unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "is a 7z archive"),
    "lz4": (b"\x04\x22\x4d\x18data", "is compressed by lz4: decompress it, or use gzip"),
    "twice": (gzip.compress(gzip.compress(LINES)), "is compressed twice"),
    "parquet.gz": (gzip.compress(b"PAR1data"), "is compressed Parquet or Arrow: decompress it"),
    "safetensors": (b"\x40\0\0\0\0\0\0\0{}", "is a safetensors file: give preference pairs, not weights"),
    "utf-16": (LINES.decode().encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer .*: run git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html>", "is a web page: download the file itself"),
    "unknown": (bytes(range(256)), "is binary data of an unknown kind"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_files_are_named_for_what_they_are(tmp_path, kind):
    data, expected = FOREIGN[kind]
    for name in ("pairs.jsonl", "pairs.csv"):
        path = write(tmp_path / name, data)
        with pytest.raises(UserError, match=expected):
            rows(path)
        message(path)


def test_a_pipe_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "cannot be read twice: write it to a file first" in message(tmp_path / "pipe")


def test_a_pickle_is_never_loaded(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "loaded"), "w"))

    message(write(tmp_path / "p.jsonl", pickle.dumps(Harmful())))
    assert not (tmp_path / "loaded").exists()


# -- JSON --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("key", ["data", "a \\ key: [ "])
def test_an_object_around_one_array_is_read(tmp_path, key, indent):
    path = write(tmp_path / "p.json", "\ufeff\n" + json.dumps({key: ROWS}, indent=indent) + "\n")
    assert list(read_rows(path)) == list(enumerate(ROWS, start=1))
    assert len(list(read_pairs(path))) == 3


@pytest.mark.parametrize("row", [{"data": []}, {"messages": [{"role": "user", "content": "Q"}]}, {"texts": ["a"]}])
def test_a_row_with_one_list_is_not_taken_for_an_array(tmp_path, row):
    assert rows(write(tmp_path / "p", json.dumps(row))) == ([] if row == {"data": []} else [row])
    assert rows(write(tmp_path / "p", json.dumps(row) + "\n" + json.dumps(row))) == [row, row]


def test_rows_that_begin_with_a_list_are_lines(tmp_path):
    row = {"completions": [{"rank": 0}, {"rank": 1}], "prompt": "Q"}
    assert rows(write(tmp_path / "p", (json.dumps(row) + "\n") * 2)) == [row, row]


@pytest.mark.slow
def test_an_object_around_an_array_that_is_damaged_names_the_row(tmp_path):
    text = json.dumps({"data": ROWS})
    assert "row 2 does not parse as JSON" in message(write(tmp_path / "p", text[: text.index(", 1") + 20]))
    cut = gzip.compress(json.dumps({"data": [{"n": n, "noise": hash(str(n))} for n in range(200_000)]}).encode())
    said = message(write(tmp_path / "q", cut[: len(cut) // 2]))
    assert "cannot be read after row" in said and "after row 0" not in said


def test_objects_over_several_lines_are_read(tmp_path):
    text = "\n".join(json.dumps(row, indent=1) for row in ROWS)
    assert list(read_rows(write(tmp_path / "p", text))) == list(enumerate(ROWS, start=1))
    assert "row 3 does not parse" in message(write(tmp_path / "p", text[:-5]))
    whole = {"version": 1, "data": ROWS}
    assert rows(write(tmp_path / "p", json.dumps(whole, indent=1))) == [whole]


def test_a_struct_of_lists_becomes_messages(tmp_path):
    turned = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    row = {"chosen": {"role": ["user", "assistant"], "content": ["Q", "A"]}, "x": {"role": ["a"], "content": []}}
    assert rows(write(tmp_path / "p", json.dumps(row))) == [{"chosen": turned, "x": row["x"]}]


def test_what_to_do_is_said(tmp_path):
    assert message(write(tmp_path / "p", "{'a': 1}\n")).endswith(
        "JSON has double quotes only, and json.dumps writes it"
    )
    assert message(write(tmp_path / "p", b'{"a": "\xe9"}\n')).endswith("; save it as UTF-8")
    assert message(write(tmp_path / "p", gzip.compress(LINES)[:-9])).endswith("; copy or download it again")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_in_any_way(tmp_path, end):
    text = ("\ufeff" + LINES.decode() + "\n" + "\ufeff" + LINES.decode()).replace("\n", end)
    assert rows(write(tmp_path / "p", text)) == ROWS * 2
    assert [number for number, _ in read_rows(tmp_path / "p")] == [1, 2, 3, 5, 6, 7]


# -- CSV ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter, name", [(",", "p.csv"), (";", "p.csv"), ("\t", "p.tsv"), ("\t", "P.TSV")])
def test_csv_with_line_breaks_quotes_and_separators_in_fields(tmp_path, delimiter, name):
    fields = "\n".join(f'"Name a bird, {n}\n"{delimiter}Möwe{delimiter}"a ""bat"""' for n in range(3))
    text = f"\ufeffprompt{delimiter}chosen{delimiter}rejected\n{fields}\n\n"
    assert list(read_rows(write(tmp_path / name, text))) == list(enumerate(ROWS, start=1))
    assert rows(write(tmp_path / f"{name}.gz", gzip.compress(text.encode()))) == ROWS
    assert len(list(read_pairs(tmp_path / name))) == 3


def test_a_space_after_each_separator_belongs_to_no_field(tmp_path):
    path = write(tmp_path / "p.csv", 'prompt, chosen, rejected\nQ, "a, b",  c\n')
    assert rows(path) == [{"prompt": "Q", "chosen": "a, b", "rejected": "c"}]
    assert rows(write(tmp_path / "q.csv", "prompt,chosen\nQ, a\n")) == [{"prompt": "Q", "chosen": " a"}]


def test_empty_fields_are_null_and_the_index_of_pandas_is_left_out(tmp_path):
    path = write(tmp_path / "p.csv", ",prompt,chosen,rejected,id\n0,Q,a,b,\n1,R,NA,null,7\n")
    assert rows(path) == [
        {"prompt": "Q", "chosen": "a", "rejected": "b", "id": None},
        {"prompt": "R", "chosen": "NA", "rejected": "null", "id": "7"},
    ]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a,b\n1,2\n1,2,3\n", "row 2 (line 3) has 3 fields, but the header has 2"),
        ('a,b\n"x\ny",2\n1\n', "row 2 (line 4) has 1 fields, but the header has 2"),
        ('a,b\n1,2\n"x,2\n3,4\n', "row 2 (line 4) is not CSV: unexpected end of data"),
        ('a,b\n"x"y,2\n', "row 1 (line 2) is not CSV: ',' expected after '\"'"),
        ("a,b,a\n1,2,3\n", "the header names 'a' more than once"),
        ("a,,b\n1,2,3\n", "column 2 has no name in the header"),
        (b"a,b\n1,2\n\xe9,3\n", "is not UTF-8 text after row 0"),
    ],
)
def test_csv_that_cannot_be_read_names_the_row(tmp_path, text, expected):
    assert expected in message(write(tmp_path / "p.csv", text))


def test_json_called_csv_is_json(tmp_path):
    assert rows(write(tmp_path / "p.csv", LINES)) == ROWS
    assert rows(write(tmp_path / "q.csv", b"")) == []


def test_a_long_field_is_read(tmp_path):
    assert rows(write(tmp_path / "p.csv", "a,b\n" + "x" * 1_000_000 + ",2\n"))[0]["a"] == "x" * 1_000_000


# -- Parquet and Arrow -------------------------------------------------------------------------------------------------


def test_parquet_is_recognised_by_its_content(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.jsonl")
    assert rows(tmp_path / "p.jsonl") == ROWS


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_files_that_are_cut_off_are_refused(tmp_path, new):
    table = pa.Table.from_pylist(ROWS)
    with new(str(tmp_path / "p"), table.schema) as stream:
        stream.write_table(table)
    assert rows(tmp_path / "p") == ROWS
    write(tmp_path / "q", (tmp_path / "p").read_bytes()[:-6])
    assert "q cannot be read after row" in message(tmp_path / "q")
