"""The ``index`` step: labelled pairs to an aligned Megatron dataset, written in shards by several processes."""

import itertools
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

from treg_megatron.config.schema import IndexSection
from treg_megatron.data.labelled_pairs import count_rows, labelling_run, read_labelled
from treg_megatron.data.records import is_parquet, source_identity
from treg_megatron.data.streams import merge_streams, open_streams, split_streams, write_streams
from treg_megatron.errors import UserError
from treg_megatron.labelling.import_rewards import labelled_from_text
from treg_megatron.tokenizer.chat import ChatTokenizer, load_tokenizer
from treg_megatron.utils.lock import Lock


def validation_prefix(output: str | Path) -> str:
    """The prefix under which ``index`` writes the held-out pairs of the aligned dataset ``output``."""
    return f"{output}_validation"


def index(section: IndexSection) -> dict[str, Any]:
    """Write ``section.labelled`` as an aligned dataset under the prefix ``section.output``; return its manifest.

    The input is labelled pairs in Parquet, or a text file of pairs with token rewards
    (:mod:`treg_megatron.labelling.import_rewards`).

    Raises:
        UserError: the labels are incomplete, invalid, or were made with a tokenizer other than ``section.tokenizer``.
    """
    if section.workers < 1 or not 0 <= section.validation_fraction < 1:
        raise UserError(
            f"index.workers={section.workers} must be at least 1, index.validation_fraction="
            f"{section.validation_fraction:g} in [0, 1)"
        )
    source = Path(section.labelled)
    from_text = source.is_file() and not is_parquet(source)
    run = {"pairs": source_identity(source), "token_rewards": "own"} if from_text else labelling_run(source)
    labelled_with = (run or {}).get("tokenizer") or {}
    tokenizer = load_tokenizer(section.tokenizer, labelled_with.get("chat_template", ""))
    if labelled_with.get("sha256", tokenizer.sha256) != tokenizer.sha256:
        raise UserError(
            f"{section.labelled} was made with another tokenizer than that of {section.tokenizer}: "
            "label with the tokenizer of the model to be trained, or set index.tokenizer to the one used for labelling"
        )
    parts = Path(f"{section.output}.parts")  # beside the output, so that it is on the same disk

    def write(prefix: str | Path) -> dict[str, Any]:
        if from_text:
            assert run is not None
            pairs = labelled_from_text(source, tokenizer, section.workers, run)  # which counts into run
            return write_streams(prefix, pairs, tokenizer, run)
        return _write(prefix, section, tokenizer, run, parts)

    with Lock(section.output):
        try:
            if not section.validation_fraction:
                return write(section.output)
            write(parts / "all")
            return split_streams(
                open_streams(parts / "all"),
                (section.output, validation_prefix(section.output)),
                section.validation_fraction,
            )[0]
        finally:
            shutil.rmtree(parts, ignore_errors=True)


def _write(
    prefix: str | Path, section: IndexSection, tokenizer: ChatTokenizer, run: dict | None, parts: Path
) -> dict[str, Any]:
    rows = count_rows(section.labelled)
    workers = min(section.workers, rows)
    if workers <= 1:
        return write_streams(prefix, read_labelled(section.labelled), tokenizer, run)
    edges = [rows * worker // workers for worker in range(workers + 1)]
    shards = [parts / f"part-{worker}" for worker in range(workers)]
    # Fork, so that each child inherits the tokenizer and modules, which take seconds to load.
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        pool.starmap(
            _write_shard,
            [
                (shard, section.labelled, *edge, tokenizer, run)
                for shard, edge in zip(shards, itertools.pairwise(edges), strict=True)
            ],
            chunksize=1,
        )
    return merge_streams(prefix, shards)


def _write_shard(
    prefix: Path, labelled: str, first: int, last: int, tokenizer: ChatTokenizer, run: dict | None
) -> None:
    write_streams(prefix, read_labelled(labelled, first, last), tokenizer, run)
