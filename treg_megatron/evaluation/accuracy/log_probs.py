"""Log-probs that a model gives to responses, token by token, cached in shards.

A shard is a Parquet file with a row per item, and carries the fingerprint of its run, so that values of different
models or responses never mix. It is written whole or not at all (:mod:`treg_megatron.utils.shard_job`): an interrupted
job goes on with the shards that do not exist, and a finished one loads no model.
"""

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from treg_megatron.distributed.launch import rank_info
from treg_megatron.errors import UserError
from treg_megatron.labelling.scoring import ScoredSequence, Scorer
from treg_megatron.utils.files import atomic_write
from treg_megatron.utils.shard_job import ShardJob, Share, require_same_run

SHARD_PATTERN = "log-probs-{:05d}.parquet"

_METADATA_KEY = b"treg_megatron"
_SCHEMA = pa.schema([("item", pa.string()), ("log_probs", pa.list_(pa.list_(pa.float32())))])


class Item(NamedTuple):
    """Responses that are scored together: both sides of a preference pair, or the turns of an answer.

    ``scored`` tells for each response which of its tokens count, [response tokens] bool.
    """

    item_id: str
    sequences: tuple[ScoredSequence, ...]
    scored: tuple[np.ndarray, ...]


def sequence(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> ScoredSequence:
    """A prompt and its response in 4 bytes per token: an evaluation holds all of its sequences in memory."""
    return ScoredSequence(array("i", prompt_ids), array("i", response_ids))


@dataclass(frozen=True)
class LogProbShards:
    """The log-probs of one model for a list of items, in a folder.

    Attributes:
        folder: where the shards are.
        run: fingerprint of everything that decides the values: model, precision and items.
        key: the recipe key that names the folder, for messages.
        items: what is scored, in order.
        shard_size: items per shard.
    """

    folder: Path
    run: dict[str, Any]
    key: str
    items: Sequence[Item]
    shard_size: int

    def fill(self, step: str, unit: str, load: Callable[[], Scorer]) -> None:
        """Score this process's share of what no shard holds yet.

        Args:
            step: name of the progress bar.
            unit: what the items are, in the plural.
            load: the model; called only if something is left to score.

        Raises:
            UserError: the folder holds another run, another process is writing to it, or a log-prob is not finite.
        """
        self._require_own()
        job = self._job
        finished = job.finished()
        if all(portion in finished for portion in job.mine):
            return
        job.require_free(finished)
        scorer = load()
        longest = max((s.length for item in self.items for s in item.sequences), default=0)
        if longest > scorer.max_length:
            raise UserError(
                f"a sequence has {longest} tokens, but {self.run['model']['name']} has {scorer.max_length} positions: "
                "lower accuracy.max_length"
            )
        with job.progress(step, unit, finished) as progress:
            for portion, items in job.unfinished(self.items, finished):
                count, done = sum(len(item.sequences) for item in items), 0

                def scored(sequences: int, tokens: int, count: int = count, size: int = len(items)) -> None:
                    nonlocal done
                    progress.worked((done + sequences) * size // count - done * size // count, tokens)
                    done += sequences

                log_probs = iter(scorer.score([s for item in items for s in item.sequences], scored))
                rows = [[next(log_probs)[mask] for mask in item.scored] for item in items]
                self._write(job.path(portion), items, rows)

    def is_complete(self) -> bool:
        """Whether every shard is there, whichever process wrote it."""
        return len(self._job.finished()) == len(self._job.portions)

    def read(self) -> Iterator[list[np.ndarray]]:
        """For each item in order and each of its responses: [scored tokens] fp32, in nats.

        Raises:
            UserError: a shard is damaged, or is of another run.
        """
        self._require_own()
        for portion, path in enumerate(self._job.paths):
            items = self.items[portion * self.shard_size : (portion + 1) * self.shard_size]
            try:
                table = pq.read_table(path, schema=_SCHEMA, page_checksum_verification=True)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{path} cannot be read: {error}; delete it and run the command again") from None
            if table["item"].to_pylist() != [item.item_id for item in items]:
                raise UserError(f"{path} holds other items than its run names; delete it and run the command again")
            for row in table["log_probs"].to_pylist():
                yield [np.array(values, np.float32) for values in row]

    @property
    def _job(self) -> ShardJob:
        here = rank_info()
        share = Share(here.rank, here.size)
        return ShardJob(self.folder, SHARD_PATTERN, len(self.items), self.shard_size, share)

    def _require_own(self) -> None:
        for path in self._job.paths:
            if path.exists():
                require_same_run(_run_of(path), self.run, f"{path} is a run", self.key)

    def _write(self, path: Path, items: Sequence[Item], rows: list[list[np.ndarray]]) -> None:
        for item, row in zip(items, rows, strict=True):
            if not all(np.isfinite(values).all() for values in row):
                raise UserError(
                    f"{self.run['model']['name']} gives non-finite log-probs for {item.item_id}; its weights are "
                    "damaged, or it needs accuracy.dtype=float32"
                )
        columns = [[item.item_id for item in items], rows]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
        table = pa.table(arrays, schema=_SCHEMA.with_metadata({_METADATA_KEY: json.dumps(self.run)}))
        with atomic_write(path) as partial:
            pq.write_table(table, partial, compression="zstd", write_page_checksum=True)


def _run_of(path: Path) -> dict[str, Any] | None:
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}; delete it and run the command again") from None
    return json.loads(metadata[_METADATA_KEY]) if _METADATA_KEY in metadata else None
