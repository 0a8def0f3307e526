"""Consistency checks of the files that a recipe names, if they exist."""

from pathlib import Path

from treg_megatron.checkpoint.layout import read_metadata
from treg_megatron.data.aligned import manifest_path
from treg_megatron.data.blend import parse_blend
from treg_megatron.data.checks import require_enough, require_trainable
from treg_megatron.data.streams import open_streams, require_same_tokenizer
from treg_megatron.models.architecture import require_architecture
from treg_megatron.objective import Objective
from treg_megatron.preflight.plan import Sections


def check_files(sections: Sections) -> tuple[list[str], int | None]:
    """Check the datasets, tokenizer and checkpoint that are on disk against each other, as training does.

    Returns:
        One line per file, and the number of training pairs: the size of the training set, else ``cluster.pairs``,
        else None.

    Raises:
        UserError: two of them do not match, or one is damaged.
    """
    model, lines, pairs = sections.model, [], sections.cluster.pairs
    checkpoint, hf = Path(model.checkpoint), Path(model.hf)
    if checkpoint.exists():
        require_architecture(model, read_metadata(checkpoint).hf_config, str(checkpoint))
    for prefix in (sections.data.train, sections.data.validation):
        if prefix is None or not _exists(prefix):
            continue
        objective = Objective.of(sections.objective)
        streams = open_streams(prefix, objective.values)
        require_trainable(streams, sections.data, objective)
        if hf.exists():
            require_same_tokenizer(streams.manifest, hf)
        lines.append(
            f"{prefix}: {len(streams):,} pairs, the longest sequence has {int(streams.sequence_lengths.max()):,} tokens"
        )
        if prefix == sections.data.train:
            pairs = len(streams)
    if pairs is not None:
        require_enough(pairs, sections.data, "the training set")
    for what, path in (("Hugging Face folder", hf), ("checkpoint", checkpoint)):
        lines.append(f"{what} {path}: {'found' if path.exists() else 'not on this machine, not checked'}")
    return lines, pairs


def _exists(prefix: str) -> bool:
    return manifest_path(prefix).exists() or all(manifest_path(each).exists() for each in parse_blend(prefix)[0])
