"""A source that several processes read gives the report of one process, bit for bit."""

import json
import random
import re
from pathlib import Path

import pytest

from tests.support.pair_formats import EXAMPLES
from tests.unit.test_mutated_records import mutated
from treg_megatron.containers import json_portions
from treg_megatron.containers.json_portions import end_of_elements, parsed
from treg_megatron.data import records
from treg_megatron.data.inspection import inspect_pairs
from treg_megatron.data.pairs import Reading
from treg_megatron.data.records import read_rows, work_on_rows
from treg_megatron.errors import UserError

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).resolve().parents[1] / "data" / "pairs"


@pytest.fixture(autouse=True)
def small_portions(monkeypatch):
    """Make a few rows a large source."""
    monkeypatch.setattr(json_portions, "PORTION", 300)
    monkeypatch.setattr(records, "_ROWS_AT_ONCE", 2)
    monkeypatch.setattr(records, "_ALONE", 1)


def outcome(read):
    try:
        return read()
    except UserError as error:
        return str(error)


def sequential(source):
    """Rows of a source as one after the other is read, and how it ends."""
    rows = []
    try:
        for numbered in read_rows(source):
            rows.append(numbered)
    except UserError as error:
        return rows, str(error)
    return rows, ""


def shared(source, workers=2):
    """The same, by several processes."""
    rows = []
    try:
        for before, batch in work_on_rows(list, source, workers, alone=lambda: False):
            rows += [(before + number, row) for number, row in batch]
    except UserError as error:
        return rows, str(error)
    return rows, ""


def require_equal(source, **options):
    """The report by one process, after a check that several give the same, and the rows of ``read_rows``."""
    (expected, ending), (found, message) = sequential(source), shared(source)
    assert message == ending and repr(found) == repr(expected[: len(found)])
    assert ending or len(found) == len(expected)
    reports = [outcome(lambda n=n: inspect_pairs(source, examples=2, workers=n, **options)) for n in (1, 2)]
    assert json.dumps(reports[0]) == json.dumps(reports[1])
    return reports[0]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.iterdir()))
def test_files_of_every_container(name, tmp_path):
    require_equal(FOLDER / name, reading=Reading("trl_implicit_text") if name == "trl_implicit_text.jsonl" else None)


@pytest.mark.parametrize(
    "name, form",
    [
        *((name, ("lines", "array")[i % 2]) for i, name in enumerate(EXAMPLES)),
        *(("trl", form) for form in ("lines", "array", "indented", "object", "values")),
    ],
)
def test_harmed_records_of_every_format(name, form, tmp_path):
    chance = random.Random(name)
    rows = [mutated(EXAMPLES[name][0], chance) if chance.random() < 0.5 else EXAMPLES[name][0] for _ in range(60)]
    rows = [{**row, "id": i} if i % 7 else row for i, row in enumerate(rows)]
    text = {
        "lines": lines(rows),
        "array": json.dumps(rows),
        "indented": json.dumps(rows, indent=1),
        "object": json.dumps({"data": rows}),
        "values": "\n".join(json.dumps(row, indent=1) for row in rows),
    }[form]
    (tmp_path / "pairs").write_text(text)
    report = require_equal(tmp_path / "pairs", reading=Reading(name))
    assert report["pairs"] + report["unusable"] > 10


ROWS = [
    {"prompt": f'q{i} \\ " }}], {{ \\', "chosen": "ja " * (i % 40), "rejected": "né" * 3, "id": i} for i in range(60)
]
ARRAY = json.dumps(ROWS, ensure_ascii=False)
END_OF_A_ROW = re.compile(r'("id": 40\s*\}),?')
#: What happens to the text of an array, and whether a report can still be made.
DAMAGE = {
    "a row cut off": (lambda text: text[:-30], False),
    "a comma too many": (lambda text: END_OF_A_ROW.sub(r"\1,,", text), False),
    "a comma missing": (lambda text: END_OF_A_ROW.sub(r"\1", text), False),
    "a bracket too many": (lambda text: END_OF_A_ROW.sub(r"\1],", text), False),
    "the array ends early": (lambda text: END_OF_A_ROW.sub(r"\1], [", text), False),
    "single quotes": (lambda text: text.replace('"id": 40', "'id': 40"), False),
    "a quote missing": (lambda text: text.replace('"id": 40', '"id: 40'), False),
    "a backslash outside": (lambda text: text.replace('"id": 40', '\\"id": 40'), False),
    "nothing between commas": (lambda text: END_OF_A_ROW.sub(r"\1,   ,", text), False),
    "more behind the end": (lambda text: text + "  [1, 2]", False),
    "bytes that are no text": (lambda text: text.encode().replace(b'"id": 40', b'"\xff": 40'), False),
    "a character cut in two": (lambda text: text[:-30].encode() + "é".encode()[:1], False),
    "half of an escape": (lambda text: text.replace('"id": 40', '"id\\ud8": 40'), False),
    "a line break in a text": (lambda text: text.replace("q40", "q\n40"), False),
    "depth": (lambda text: text.replace('"id": 40', '"id": ' + "[" * 100_000), False),
    "a row that is none": (lambda text: END_OF_A_ROW.sub(r"\1, 7,", text), True),
    "the same id again": (lambda text: text.replace('"id": 40', '"id": 39').replace('"id": 59', '"id": 2'), True),
    "a mark before it": (lambda text: "\n\ufeff" + text, True),
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_an_array_is_told_in_the_same_words(damage, indent, tmp_path):
    text = json.dumps(ROWS, ensure_ascii=indent is not None, indent=indent)
    harm, still_read = DAMAGE[damage]
    harmed = harm(text)
    assert harmed != text
    (tmp_path / "pairs").write_bytes(harmed if isinstance(harmed, bytes) else harmed.encode())
    report = require_equal(tmp_path / "pairs")
    assert isinstance(report, dict) == still_read, report


LINES = lines(ROWS)
DAMAGED_LINES = {
    "a row cut off": (lambda text: text[:-30], False),
    "single quotes": (lambda text: text.replace('"id": 40', "'id': 40"), False),
    "bytes that are no text": (lambda text: text.encode().replace(b'"id": 40', b'"\xff": 40'), False),
    "no text behind blank lines": (lambda text: text.encode().replace(b"}\n", b"}" + b"\n" * 999 + b"\xff"), False),
    "half of an escape": (lambda text: text.replace('"id": 40', '"id\\ud8": 40'), False),
    "a line break in a text": (lambda text: text.replace("q40", "q\n40"), False),
    "depth": (lambda text: text.replace('"id": 40', '"id": ' + "[" * 100_000), False),
    "a row that is none": (lambda text: text.replace('"id": 40}', '"id": 40}\n7'), True),
    "the same id again": (lambda text: text.replace('"id": 40', '"id": 39').replace('"id": 59', '"id": 2'), True),
    "blank lines": (lambda text: text.replace("\n", "\n\n \r\n"), True),
    "carriage returns": (lambda text: text.replace("\n", "\r"), True),
    "carriage returns, damaged": (lambda text: text.replace("\n", "\r").replace('"id": 40', "id"), False),
    "byte-order marks": (lambda text: "\ufeff" + text.replace("}\n", "}\n\ufeff", 50), True),
    "no last line break": (lambda text: text[:-1], True),
}


@pytest.mark.parametrize("damage", DAMAGED_LINES)
def test_damage_to_lines_is_told_in_the_same_words(damage, tmp_path):
    harm, still_read = DAMAGED_LINES[damage]
    harmed = harm(LINES)
    assert harmed != LINES
    (tmp_path / "pairs").write_bytes(harmed if isinstance(harmed, bytes) else harmed.encode())
    report = require_equal(tmp_path / "pairs")
    assert isinstance(report, dict) == still_read, report


def test_rows_of_several_files_are_numbered_on(tmp_path):
    (tmp_path / "a.json").write_text(ARRAY)
    (tmp_path / "b.json").write_text(json.dumps([{**row, "id": f"b{row['id']}"} for row in ROWS]))
    report = require_equal(f"{tmp_path}/a.json,{tmp_path}/b.json")
    assert report["pairs"] == len(ROWS) * 2 - 4 and report["first_unusable"][0].startswith("row 1:")
    (tmp_path / "b.json").write_text(ARRAY[:-9])
    assert "row 120 (row 60 of this file)" in require_equal(f"{tmp_path}/a.json,{tmp_path}/b.json")
    (tmp_path / "c.jsonl").write_text(lines(ROWS) + "\n\n")
    (tmp_path / "d.jsonl").write_text("\n" + lines(ROWS)[:-5])
    assert "row 121 (row 61 of this file)" in require_equal(f"{tmp_path}/c.jsonl,{tmp_path}/d.jsonl")


def test_portions_are_cut_between_elements_alone():
    data = ARRAY[1:].encode()
    ends = {end_of_elements(data[:size]) for size in range(len(data) + 1)}
    decoder, place, expected = json.JSONDecoder(), 1, {0}
    while (place := decoder.raw_decode(ARRAY, place)[1]) and ARRAY[place] == ",":
        expected.add(len(ARRAY[1 : place + 1].encode()))
        place += 2
    assert ends == expected


def test_the_work_is_shared(tmp_path):
    (tmp_path / "pairs").write_text(ARRAY)
    portions = list(json_portions.json_portions(tmp_path / "pairs"))
    assert len(portions) > 10 and portions[-1].data is None and parsed(portions[-1]) is None
    assert sum(parsed(portion).numbers for portion in portions[:-1]) > 50
    assert parsed(portions[0]._replace(data=b" ,")) is None
