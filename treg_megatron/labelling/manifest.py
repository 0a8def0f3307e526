"""What made a folder of labels: the fingerprint of its run, in every shard, and the manifest, which is written last."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from treg_megatron.config.schema import LabelSection
from treg_megatron.data.labelled_pairs import (
    MANIFEST_FORMAT,
    MANIFEST_VERSION,
    SIDES,
    read_labelled,
    read_shard_metadata,
)
from treg_megatron.data.pairs import Pair, none_left
from treg_megatron.data.records import source_identity
from treg_megatron.data.scored import is_scored
from treg_megatron.data.symptoms import Symptoms, signs_of
from treg_megatron.errors import UserError
from treg_megatron.formats import AUTO
from treg_megatron.labelling.source import MAIN, Sources
from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.utils.parallel import batches
from treg_megatron.utils.shard_job import ShardJob, require_same_run

SHARD_PATTERN = "shard-{:05d}.parquet"


def require_own_output(found: dict[str, Any] | None, run: dict[str, Any], path: Path) -> None:
    """Check that ``path``, a shard or the manifest, was written by this run.

    Args:
        found: fingerprint of the run in the file, or None if it holds none.
        run: fingerprint of this run.

    Raises:
        UserError: it was not.
    """
    if found is None:
        raise UserError(f"{path} was not written by this run; name another label.output, or remove that folder")
    require_same_run(found, run, f"{path} is a run", "label.output")


def fingerprint(section: LabelSection, tokenizer: ChatTokenizer, source: Sources) -> dict[str, Any]:
    """Everything that determines the labels. Batch size and device are left out: they only change rounding."""
    from treg_megatron.models.huggingface import model_identity  # imports torch

    return {
        "pairs": source_identity(section.pairs),
        "reference": {**model_identity(section.model), "dtype": section.dtype},
        "tokenizer": tokenizer.identity,
        **source.identity(),
        "max_length": section.max_length,
        "max_revision_length": section.max_revision_length,
        "reward_eot": section.reward_eot,
        "shard_pairs": section.shard_pairs,
        **_reading(section),
    }


def _reading(section: LabelSection) -> dict[str, Any]:
    """How the pairs are read, where the file alone does not say it."""
    given = {"format": section.format, "columns": dict(section.columns), "ignore": list(section.ignore)}
    return {"reading": given} if given != {"format": AUTO, "columns": {}, "ignore": []} else {}


class Portions:
    """What the portions of a job hold, without the pairs themselves.

    Attributes:
        total: number of pairs.
        sha256: hash of the names and contents of each portion's pairs.
        warnings: what in the pairs speaks of a fault.
        all_weigh_nothing: whether every pair has the weight 0.
    """

    def __init__(self, pairs: Iterable[Pair], size: int):
        self.total, self.sha256, self.all_weigh_nothing = 0, [], True
        symptoms = Symptoms()
        for portion in batches(pairs, size):
            self.total += len(portion)
            symptoms.add([signs_of(pair) for pair in portion])
            digest = hashlib.sha256()
            for pair in portion:
                sampled = [pair.chosen_ids, pair.rejected_ids, pair.tokenizer]
                identity: list[Any] = [pair.pair_id, pair.content, pair.chosen_score, pair.rejected_score, sampled]
                if pair.pair_weight is not None:
                    identity.append(pair.pair_weight)
                if pair.own is not None:
                    identity.append(pair.own)
                digest.update(json.dumps(identity).encode())
                self.all_weigh_nothing &= pair.pair_weight == 0
            self.sha256.append(digest.hexdigest())
        self.warnings = symptoms.warnings()


class Shards:
    """The shards that a folder already holds: of which run they are, and which of them are current.

    A shard is current if it was made from the pairs that its portion holds now. When a row is corrected or taken out of
    the pairs, the shards that do not hold it stay.

    Args:
        output: the folder.
        run: fingerprint of this run.
        sha256: hash of the pairs of each portion, from :class:`Portions`.
    """

    def __init__(self, output: Path, run: dict[str, Any], sha256: list[str]):
        self.output, self.run, self.sha256 = output, run, sha256

    def metadata(self, portion: int, drops: dict[str, int]) -> dict[str, Any]:
        """What a shard says of itself."""
        return {"run": self.run, "portion": self.sha256[portion], "drops": drops}

    def is_current(self, portion: int) -> bool:
        """Whether the existing shard of a portion was made from the portion as it is now."""
        metadata = read_shard_metadata(self.output / SHARD_PATTERN.format(portion)) or {}
        if "portion" not in metadata:  # written before shards knew their portion
            return metadata.get("run") == self.run
        return metadata["portion"] == self.sha256[portion]

    def require_own(self, job: ShardJob) -> None:
        """Check that every shard is this run's, and remove those of portions that the pairs no longer have.

        Raises:
            UserError: a file is another run's, or none of the shards was made from these pairs.
        """
        found = sorted(self.output.glob("*.parquet"))
        known = {self.output / SHARD_PATTERN.format(number): number for number in range(len(found) + job.total)}
        for path in found:
            run = (read_shard_metadata(path) or {}).get("run") if path in known else None
            require_own_output(run and _settings(run), _settings(self.run), path)
        if found and not job.finished():
            run = (read_shard_metadata(found[0]) or {})["run"]
            require_own_output(run, self.run, found[0])
        for path in found:
            if known[path] not in job.portions:
                path.unlink(missing_ok=True)


def _settings(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name != "pairs"}


def finish(job: ShardJob, drops: Counter[str], run: dict[str, Any], section: LabelSection) -> dict[str, Any]:
    """Sum up all shards and write the manifest.

    Args:
        job: a job whose shards are all finished.
        drops: counts, by reason, of the records dropped before the job was cut into shards.

    Raises:
        UserError: a shard is another run's; or every pair was dropped, and the empty shards are removed.
    """
    shards: list[dict[str, Any]] = []
    drops = Counter(drops)
    means = {MAIN: _Means(), **{name: _Means() for name in sorted(section.values)}}
    for path in job.paths:
        pairs = 0
        for pair in read_labelled(path):
            pairs += 1
            for side in SIDES:
                means[MAIN].add(side, getattr(pair, f"{side}_token_rewards"))
                for name, rewards in getattr(pair, f"{side}_values").items():
                    means[name].add(side, rewards)
        metadata = read_shard_metadata(path)
        found = (metadata or {}).get("run")  # another job may have written it meanwhile
        require_own_output(found and _settings(found), _settings(run), path)
        assert metadata is not None
        drops.update(metadata["drops"])
        shards.append({"file": path.name, "pairs": pairs})
    kept = sum(shard["pairs"] for shard in shards)
    if not kept:
        for shard in shards:
            (job.output / shard["file"]).unlink(missing_ok=True)
        raise UserError(none_left(section.pairs, drops))
    return job.finish(
        MANIFEST_FORMAT,
        MANIFEST_VERSION,
        {
            "pairs": kept,
            "drops": dict(sorted(drops.items())),
            "token_rewards": means.pop(MAIN).as_json(),
            **({"values": {name: of.as_json() for name, of in means.items()}} if means else {}),
            "run": run,
            "shards": shards,
        },
    )


class _Means:
    """Means over the scored tokens of labelled pairs."""

    def __init__(self):
        self.magnitude, self.sides = _Mean(), {side: _Mean() for side in SIDES}

    def add(self, side: str, rewards: np.ndarray) -> None:
        rewards = rewards[is_scored(rewards)]
        self.sides[side].add(rewards)
        self.magnitude.add(np.abs(rewards))

    def as_json(self) -> dict[str, float]:
        return {"mean_abs": self.magnitude.value, **{f"{side}_mean": mean.value for side, mean in self.sides.items()}}


class _Mean:
    def __init__(self):
        self.total, self.count = 0.0, 0

    def add(self, values: np.ndarray) -> None:
        self.total += float(values.sum(dtype=np.float64))
        self.count += len(values)

    @property
    def value(self) -> float:
        return round(self.total / max(self.count, 1), 6)
