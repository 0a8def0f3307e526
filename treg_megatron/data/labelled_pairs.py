"""Labelled pairs: token ids, token rewards and reference log-probs of preference pairs, as Parquet.

One row per pair. ``chosen_tokens`` and ``rejected_tokens`` are prompt followed by response; the lists of rewards and
log-probs have one value per response token, value t for response token t. Further token rewards may stand beside the
main ones under names of their own (``chosen_token_rewards_NAME``). Such files may come from any source of token
rewards, so everything in them is validated when they are read. Files written here have a checksum per page.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from treg_megatron.data.aligned import VALUES_NAME
from treg_megatron.data.pairs import LARGEST_WEIGHT, is_weight
from treg_megatron.data.scored import is_scored
from treg_megatron.errors import UserError
from treg_megatron.utils.files import atomic_write, natural_order, read_manifest
from treg_megatron.utils.shard_job import MANIFEST_NAME

MANIFEST_FORMAT, MANIFEST_VERSION = "treg-megatron labelled pairs", 1

_METADATA_KEY = b"treg_megatron"
_ROWS_AT_ONCE = 1024
_LOGPROB_TOLERANCE = 1e-3  # rounding may give log-probs slightly above 0

SIDES = ("chosen", "rejected")
_LISTS = {
    f"{side}_{name}": type
    for side in SIDES
    for name, type in (("tokens", pa.int32()), ("token_rewards", pa.float32()), ("ref_logprobs", pa.float32()))
}
_NAMED = re.compile(rf"(chosen|rejected)_token_rewards_({VALUES_NAME})")
_REFERENCE = tuple(f"{side}_ref_logprobs" for side in SIDES)
_OPTIONAL = {
    "chosen_score": pa.float64(),
    "rejected_score": pa.float64(),
    "prompt": pa.string(),
    "chosen": pa.string(),
    "rejected": pa.string(),
    "pair_weight": pa.float64(),
}


@dataclass(frozen=True)
class LabelledPair:
    """One labelled pair: int32 token ids [s] and fp32 values [response tokens]; scores, texts and weight, if known.

    Attributes:
        chosen_values, rejected_values: named token rewards, fp32 [response tokens] each, the same names on both sides.
    """

    pair_id: str
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    chosen_token_rewards: np.ndarray
    rejected_token_rewards: np.ndarray
    chosen_ref_logprobs: np.ndarray | None = None
    rejected_ref_logprobs: np.ndarray | None = None
    chosen_score: float | None = None
    rejected_score: float | None = None
    prompt: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    pair_weight: float | None = None
    chosen_values: Mapping[str, np.ndarray] = field(default_factory=dict)
    rejected_values: Mapping[str, np.ndarray] = field(default_factory=dict)


def write_shard(
    path: str | Path, pairs: Iterable[LabelledPair], metadata: dict[str, Any] | None = None, weighted: bool = False
) -> int:
    """Write labelled pairs as one Parquet file, atomically, and return their number.

    Memory holds one batch of rows at a time. ``metadata`` (JSON values) is stored in the file; it is written after the
    last pair, so it may be filled in while the pairs are produced. Only with ``weighted`` is there a column of weights.
    All pairs have the named values of the first.
    """
    pairs, written = iter(pairs), 0
    rows = list(itertools.islice(pairs, _ROWS_AT_ONCE))
    lists = {**_LISTS, **_named_columns(rows[0].chosen_values if rows else ())}
    types = {"pair_id": pa.string(), **{name: pa.list_(type) for name, type in lists.items()}, **_OPTIONAL}
    if rows and rows[0].chosen_ref_logprobs is None:
        types = {name: type for name, type in types.items() if name not in _REFERENCE}
    if not weighted:
        del types["pair_weight"]
    schema = pa.schema(types.items())
    with (
        atomic_write(path) as partial,
        pq.ParquetWriter(partial, schema, compression="zstd", write_page_checksum=True) as file,
    ):
        while rows:
            file.write_batch(
                pa.record_batch(
                    [pa.array(_column(rows, name), type) for name, type in types.items()],
                    schema=schema,
                )
            )
            written += len(rows)
            rows = list(itertools.islice(pairs, _ROWS_AT_ONCE))
        if metadata is not None:
            file.add_key_value_metadata({_METADATA_KEY: json.dumps(metadata)})
    return written


def _named_columns(names: Iterable[str]) -> dict[str, pa.DataType]:
    return {f"{side}_token_rewards_{name}": pa.float32() for name in sorted(names) for side in SIDES}


def _column(pairs: list[LabelledPair], name: str) -> list[Any]:
    if (named := _NAMED.fullmatch(name)) is None:
        return [getattr(pair, name) for pair in pairs]
    side, value = named.groups()
    return [getattr(pair, f"{side}_values")[value] for pair in pairs]


def read_shard_metadata(path: str | Path) -> dict[str, Any] | None:
    """The ``metadata`` given to :func:`write_shard`; None for a file written by something else.

    Raises:
        UserError: the file is missing or is not Parquet.
    """
    metadata = _open(Path(path)).metadata.metadata or {}
    return json.loads(metadata[_METADATA_KEY]) if _METADATA_KEY in metadata else None


def read_labelled(
    path: str | Path, first: int = 0, last: int | None = None, values: str | None = None
) -> Iterator[LabelledPair]:
    """Read and check labelled pairs, row by row, from one Parquet file or from all Parquet files of a folder.

    ``first`` and ``last`` (exclusive) select rows by their index over all files, from 0. ``values`` names those that
    are to take the place of the token rewards.

    Files are read in the natural order of their names (part-2 before part-10), one batch of rows at a time. Wider
    integers and floats are accepted where their values fit.

    Raises:
        UserError: a file, column, type or value is invalid; the message names file, row and pair_id. Or a file has no
            such ``values``.
    """
    before = 0
    for file in labelled_files(path):
        rows = _open(file).metadata.num_rows
        begin, end = max(first - before, 0), rows if last is None else min(last - before, rows)
        if begin < end or rows == 0:
            for pair in _read_file(file, begin, end):
                yield _with_values(pair, values, file) if values else pair
        before += rows


def _with_values(pair: LabelledPair, name: str, path: Path) -> LabelledPair:
    if name not in pair.chosen_values:
        raise UserError(
            f"{path} has no token rewards named {name}, only {', '.join(pair.chosen_values) or 'the main ones'}: name "
            "one of these, or nothing for the main ones"
        )
    changed: dict[str, Any] = {}
    for side in SIDES:
        others = dict(getattr(pair, f"{side}_values"))
        changed |= {f"{side}_token_rewards": others.pop(name), f"{side}_values": others}
    return replace(pair, **changed)


def columns_beside(path: str | Path) -> list[str]:
    """What labelled pairs hold beside their main token rewards, from the metadata alone: one phrase each.

    Raises:
        UserError: as :func:`read_labelled`.
    """
    names, least, greatest, weighted = set(), math.inf, -math.inf, False
    for file in labelled_files(path):
        parquet = _open(file)
        names |= {found[2] for name in parquet.schema_arrow.names if (found := _NAMED.fullmatch(name))}
        if "pair_weight" in parquet.schema_arrow.names:
            weighted = True
            for group in range(parquet.num_row_groups):
                columns = [parquet.metadata.row_group(group).column(i) for i in range(parquet.metadata.num_columns)]
                (column,) = [column for column in columns if column.path_in_schema == "pair_weight"]
                if column.statistics is not None and column.statistics.has_min_max:
                    least, greatest = min(least, column.statistics.min), max(greatest, column.statistics.max)
    weights = [f"weights of pairs from {least:g} to {greatest:g}" if least <= greatest else "weights of pairs"]
    return [f"token rewards named {', '.join(sorted(names))}"] * bool(names) + weights * weighted


def count_rows(path: str | Path) -> int:
    """Number of rows in one Parquet file, or in all Parquet files of a folder, from the metadata alone.

    Raises:
        UserError: as :func:`read_labelled`.
    """
    return sum(_open(file).metadata.num_rows for file in labelled_files(path))


def labelled_files(path: str | Path) -> list[Path]:
    """The Parquet files at ``path``, in reading order.

    Raises:
        UserError: ``path`` does not exist, or is a folder without .parquet files.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"labelled pairs {path} do not exist")
    files = sorted(path.glob("*.parquet"), key=natural_order)
    if not files:
        raise UserError(f"{path} holds no .parquet files")
    return files


def labelling_run(path: str | Path) -> dict[str, Any] | None:
    """Provenance of labelled pairs (reference model, prompt pair, tokenizer, ...); None if not written by label_tokens.

    Raises:
        UserError: the labelling job is unfinished, or the files differ from those listed in its manifest.
    """
    path, files = Path(path), labelled_files(path)
    if path.is_file():
        return (read_shard_metadata(path) or {}).get("run")
    if not (path / MANIFEST_NAME).exists():
        if any(read_shard_metadata(file) is not None for file in files):
            raise UserError(f"{path} has no {MANIFEST_NAME}: its labelling job is unfinished; run label_tokens again")
        return None
    manifest = read_manifest(path / MANIFEST_NAME, MANIFEST_FORMAT, MANIFEST_VERSION)
    listed, found = {shard["file"] for shard in manifest["shards"]}, {file.name for file in files}
    if listed != found:
        raise UserError(
            f"{path}: {', '.join(sorted(listed ^ found))} "
            f"{'is missing' if listed - found else 'is not listed in the manifest'}; label again"
        )
    for shard in manifest["shards"]:
        if (pairs := _open(path / shard["file"]).metadata.num_rows) != shard["pairs"]:
            raise UserError(
                f"{path / shard['file']} has {pairs} pairs, its manifest says {shard['pairs']}; label again"
            )
    return manifest["run"]


# -- reading and checking ----------------------------------------------------------------------------------------------


class _Lists(NamedTuple):
    """A list column: the concatenated values of all rows, and the offset of each row."""

    values: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def row(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def first_row_where(self, wrong_values: np.ndarray) -> int | None:
        if not wrong_values.any():
            return None
        return int(np.searchsorted(self.offsets, wrong_values.argmax(), side="right")) - 1


class _WrongRow(Exception):
    def __init__(self, row: int, message: str):
        self.row, self.message = row, message


def _read_file(path: Path, begin: int, end: int) -> Iterator[LabelledPair]:
    parquet = _open(path)
    present = _require_columns(parquet.schema_arrow, path)
    first_row = begin + 1
    try:
        for first_row, batch in _batches(parquet, present, begin, end):
            ids: list[Any] = []
            try:
                ids = _pair_ids(batch)
                columns = {name: _lists(batch, name) for name in present if name in _LISTS or _NAMED.fullmatch(name)}
                _check(columns)
                named: dict[str, dict[str, _Lists]] = {}
                for name in [name for name in columns if name not in _LISTS]:
                    side, _, value = name.partition("_token_rewards_")
                    named.setdefault(f"{side}_values", {})[value] = columns.pop(name)
                optional = {
                    name: batch.column(name).cast(_OPTIONAL[name]).to_pylist() for name in present if name in _OPTIONAL
                }
                if "pair_weight" in optional:
                    optional["pair_weight"] = [_weight(value, row) for row, value in enumerate(optional["pair_weight"])]
                pairs = [_labelled_pair(ids, columns, named, optional, row) for row in range(batch.num_rows)]
            except _WrongRow as wrong:
                name = f" (pair_id {ids[wrong.row]!r})" if ids else ""
                raise UserError(f"{path} row {first_row + wrong.row}{name}: {wrong.message}") from None
            yield from pairs
            first_row += batch.num_rows
        if first_row <= end:  # a damaged page can look like a page type that readers skip
            raise UserError(f"{path} ends after row {first_row - 1}, but its metadata promises {end}: it is damaged")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: text that is not UTF-8 in row {first_row} or after ({error.reason})") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read after row {first_row - 1}: {error}") from None


def _batches(parquet: pq.ParquetFile, columns: list[str], begin: int, end: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of the rows [begin, end) of a file, each with the number of its first row, from 1."""
    groups, starts = [], [0]
    for group in range(parquet.num_row_groups):
        starts.append(starts[-1] + parquet.metadata.row_group(group).num_rows)
        if starts[-2] < end and begin < starts[-1]:
            groups.append(group)
    row = starts[groups[0]] if groups else 0
    for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns, row_groups=groups):
        wanted = batch.slice(max(begin - row, 0), max(min(end - row, batch.num_rows) - max(begin - row, 0), 0))
        if wanted.num_rows:
            yield row + max(begin - row, 0) + 1, wanted
        row += batch.num_rows


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from None


def _require_columns(schema: pa.Schema, path: Path) -> list[str]:
    required = ["pair_id", *(name for name in _LISTS if name not in _REFERENCE)]
    if missing := [name for name in required if name not in schema.names]:
        raise UserError(f"{path} lacks column {', '.join(missing)}")
    if len({name in schema.names for name in _REFERENCE}) == 2:
        raise UserError(f"{path} has only one of the columns {', '.join(_REFERENCE)}: give both, or neither")
    named = [name for name in schema.names if _NAMED.fullmatch(name)]
    for side, other in (SIDES, SIDES[::-1]):
        for name in named:
            if name.startswith(side) and other + name.removeprefix(side) not in named:
                raise UserError(f"{path} has column {name}, but none for {other}: give both, or neither")
    present = [name for name in ("pair_id", *_LISTS, *named, *_OPTIONAL) if name in schema.names]
    for name in present:
        type = schema.field(name).type
        if name in _LISTS or name in named:
            expected = "integers" if name.endswith("_tokens") else "floating-point numbers"
            is_list = pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type)
            fits = is_list and (
                pa.types.is_integer(type.value_type)
                if expected == "integers"
                else pa.types.is_floating(type.value_type)
            )
            expected = f"lists of {expected}"
        elif _OPTIONAL.get(name) == pa.float64():
            expected = "a number"
            fits = pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_null(type)
        else:
            expected, fits = (
                "text",
                pa.types.is_string(type)
                or pa.types.is_large_string(type)
                or (pa.types.is_null(type) and name != "pair_id"),
            )
        if not fits:
            raise UserError(f"{path}: column {name} must hold {expected}, it holds {type}")
    return present


def _pair_ids(batch: pa.RecordBatch) -> list[str]:
    ids = batch.column("pair_id").to_pylist()
    for row, pair_id in enumerate(ids):
        if not pair_id:
            raise _WrongRow(row, "pair_id is empty")
    return ids


def _lists(batch: pa.RecordBatch, name: str) -> _Lists:
    column = batch.column(name)
    if column.null_count:
        raise _WrongRow(column.is_null().index(True).as_py(), f"{name} is null")
    try:
        column = column.cast(pa.large_list(_LISTS.get(name, pa.float32())))
    except pa.ArrowInvalid as error:
        raise _WrongRow(0, f"{name}, in this row or one of the {batch.num_rows - 1} after it: {error}") from None
    offsets = column.offsets.to_numpy()
    values = column.flatten()
    lists = _Lists(values.fill_null(0).to_numpy(zero_copy_only=False), offsets - offsets[0])
    if values.null_count:
        raise _WrongRow(lists.first_row_where(values.is_null().to_numpy(zero_copy_only=False)), f"{name} holds a null")
    return lists


def _weight(value: float | None, row: int) -> float | None:
    if value is None or math.isnan(value):
        return None
    if not is_weight(value):
        raise _WrongRow(row, f"pair_weight is {value:g}: it must be a number from 0 to {LARGEST_WEIGHT:g}")
    return value


def _check(columns: dict[str, _Lists]) -> None:
    for side in SIDES:
        tokens, rewards = columns[f"{side}_tokens"], columns[f"{side}_token_rewards"]
        reference = columns.get(f"{side}_ref_logprobs")
        _refuse_rows(
            rewards.lengths == 0, lambda row: f"{side}_token_rewards is empty: a response has at least one token"
        )
        _refuse_rows(
            rewards.lengths >= tokens.lengths,
            lambda row: (
                f"{side}_token_rewards has {rewards.lengths[row]} values for {tokens.lengths[row]} tokens; it needs "
                "one per response token, and at least one prompt token must precede them"
            ),
        )
        _refuse_values(tokens, tokens.values < 0, f"{side}_tokens holds a negative id")
        scored = is_scored(rewards.values)
        _refuse_values(
            rewards,
            ~(np.abs(rewards.values) <= 0.5) & scored,
            f"{side}_token_rewards holds a value outside [-0.5, 0.5]",
        )
        _refuse_rows(
            np.add.reduceat(scored, rewards.offsets[:-1]) == 0,
            lambda row: f"{side}_token_rewards marks every token as not scored",
        )
        for name, values in columns.items():
            if name.startswith(f"{side}_token_rewards_"):
                _check_named(name, values, f"{side}_token_rewards", rewards)
        if reference is not None:
            _refuse_rows(
                reference.lengths != rewards.lengths,
                lambda row: (
                    f"{side}_ref_logprobs has {reference.lengths[row]} values, "
                    f"{side}_token_rewards {rewards.lengths[row]}"
                ),
            )
            _refuse_values(
                reference,
                ~((reference.values <= _LOGPROB_TOLERANCE) & np.isfinite(reference.values)),
                f"{side}_ref_logprobs holds a value that is not a finite log-prob",
            )


def _check_named(name: str, values: _Lists, main: str, rewards: _Lists) -> None:
    _refuse_rows(
        values.lengths != rewards.lengths,
        lambda row: f"{name} has {values.lengths[row]} values, {main} {rewards.lengths[row]}",
    )
    scored = is_scored(values.values)
    _refuse_values(values, ~(np.abs(values.values) <= 0.5) & scored, f"{name} holds a value outside [-0.5, 0.5]")
    _refuse_values(values, scored != is_scored(rewards.values), f"{name} marks other tokens as not scored than {main}")


def _refuse_rows(wrong: np.ndarray, message) -> None:
    if wrong.any():
        row = int(wrong.argmax())
        raise _WrongRow(row, message(row))


def _refuse_values(lists: _Lists, wrong: np.ndarray, message: str) -> None:
    row = lists.first_row_where(wrong)
    if row is not None:
        raise _WrongRow(row, message)


def _labelled_pair(
    ids: list[str],
    columns: dict[str, _Lists],
    named: dict[str, dict[str, _Lists]],
    optional: dict[str, list],
    row: int,
) -> LabelledPair:
    lists = {name: column.row(row) for name, column in columns.items()}
    prompts = [lists[f"{side}_tokens"][: -len(lists[f"{side}_token_rewards"])] for side in SIDES]
    if not np.array_equal(*prompts):
        raise _WrongRow(
            row,
            f"the prompts of the two sides differ ({len(prompts[0])} and {len(prompts[1])} tokens): both "
            "responses need the same prompt, and one reward per response token",
        )
    return LabelledPair(
        ids[row],
        **lists,
        **{name: values[row] for name, values in optional.items()},
        **{field: {name: column.row(row) for name, column in of.items()} for field, of in named.items()},
    )
