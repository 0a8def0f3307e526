"""What made a folder of labels: the fingerprint of its run, in every shard, and the manifest, which is written last."""

from collections import Counter
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
from treg_megatron.data.pairs import none_left
from treg_megatron.data.records import source_identity
from treg_megatron.errors import UserError
from treg_megatron.labelling.prompt_pair import PromptPair
from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.utils.shard_job import ShardJob, require_same_run


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


def fingerprint(section: LabelSection, tokenizer: ChatTokenizer, prompt_pair: PromptPair) -> dict[str, Any]:
    """Everything that determines the labels. Batch size and device are left out: they only change rounding."""
    from treg_megatron.models.huggingface import model_identity  # imports torch

    return {
        "pairs": source_identity(section.pairs),
        "reference": {**model_identity(section.model), "dtype": section.dtype},
        "tokenizer": {"sha256": tokenizer.sha256, "chat_template_sha256": tokenizer.template_sha256},
        "prompt_pair": {"name": prompt_pair.name, "sha256": prompt_pair.sha256},
        "max_length": section.max_length,
        "max_revision_length": section.max_revision_length,
        "reward_eot": section.reward_eot,
        "shard_pairs": section.shard_pairs,
    }


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
    means = {side: _Mean() for side in SIDES}
    magnitude = _Mean()
    for path in job.paths:
        pairs = 0
        for pair in read_labelled(path):
            pairs += 1
            for side in SIDES:
                rewards = getattr(pair, f"{side}_token_rewards")
                means[side].add(rewards)
                magnitude.add(np.abs(rewards))
        metadata = read_shard_metadata(path)
        require_own_output((metadata or {}).get("run"), run, path)  # another job may have written it meanwhile
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
            "token_rewards": {"mean_abs": magnitude.value, **{f"{side}_mean": means[side].value for side in SIDES}},
            "run": run,
            "shards": shards,
        },
    )


class _Mean:
    def __init__(self):
        self.total, self.count = 0.0, 0

    def add(self, values: np.ndarray) -> None:
        self.total += float(values.sum(dtype=np.float64))
        self.count += len(values)

    @property
    def value(self) -> float:
        return round(self.total / max(self.count, 1), 6)
