"""Writing, merging, splitting, opening and verifying aligned datasets (:mod:`treg_megatron.data.aligned`)."""

import contextlib
import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treg_megatron.data.aligned import (
    ALIGNMENT,
    MANIFEST_FORMAT,
    MANIFEST_VERSION,
    PAIR_IDS,
    PAIR_WEIGHTS,
    REF_LOGPROBS,
    TOKEN_REWARDS,
    TOKENS,
    VALUES,
    AlignedDataset,
    manifest_path,
    named_values,
    reward_stream,
    reward_streams,
    sequences_per_pair,
    stream_paths,
    streams_manifest,
    weight_range,
)
from treg_megatron.data.blend import BlendedDataset, parse_blend
from treg_megatron.data.indexed import IndexedWriter
from treg_megatron.data.labelled_pairs import LabelledPair
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.chat import ChatTokenizer, load_tokenizer
from treg_megatron.utils.files import atomic_write_all, manifest_text
from treg_megatron.utils.string_set import StringSet

_UINT16_VOCABULARY = 65500  # megatron-core's limit for two-byte tokens


class _Weights:
    """Weights of the pairs that are written, 1 where none is given; they are left out where none is given at all."""

    def __init__(self) -> None:
        self.values, self.given = array("f"), False

    def add(self, weight: float | None) -> None:
        self.values.append(1.0 if weight is None else weight)
        self.given |= weight is not None


def write_streams(
    prefix: str | Path, pairs: Iterable[LabelledPair], tokenizer: ChatTokenizer, labels: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write labelled pairs as an aligned dataset; all files appear together at the end, or none do.

    Args:
        tokenizer: the one that produced the tokens; its hashes go into the manifest.
        labels: provenance of the labels, for the manifest.

    Returns:
        The manifest.

    Raises:
        UserError: there are no pairs, a token id is outside the vocabulary, a pair_id is repeated, only some pairs have
            reference log-probs or named values, or the folder cannot be written.
    """
    pairs = iter(pairs)
    first = next(pairs, None)
    if first is None:
        raise UserError(f"there are no pairs to write to {prefix}")
    token_dtype = np.uint16 if tokenizer.vocab_size < _UINT16_VOCABULARY else np.int32
    values, reference = sorted(first.chosen_values), first.chosen_ref_logprobs is not None
    with _stream_writers(prefix, token_dtype, values, reference) as (writers, weights, manifest):
        manifest |= _write_pairs(writers, weights, values, itertools.chain([first], pairs), tokenizer)
        made_with = {**tokenizer.identity, "vocab_size": tokenizer.vocab_size}
        manifest |= _provenance(made_with, labels)
    return streams_manifest(prefix)


def merge_streams(prefix: str | Path, parts: Sequence[str | Path]) -> dict[str, Any]:
    """Concatenate aligned datasets in the order of ``parts``, and return the manifest.

    Parts of different labelling runs may be merged; the manifest then lists the labels of each. If only some parts have
    weights, the pairs of the others weigh 1.

    Raises:
        UserError: there are no parts, the parts differ in tokenizer, token dtype or named values, only some have
            reference log-probs, a pair_id is repeated, or a part is the output.
    """
    if not parts:
        raise UserError(f"there are no aligned datasets to merge into {prefix}")
    if Path(prefix).resolve() in (Path(part).resolve() for part in parts):
        raise UserError(f"aligned dataset {prefix} cannot be merged into itself; name another output")
    opened = [verify(part) for part in parts]
    first = opened[0].manifest
    for streams in opened[1:]:
        for name in ("tokenizer", "token_dtype", VALUES, "reference_logprobs"):
            if streams.manifest.get(name) != first.get(name):
                raise UserError(
                    f"aligned datasets {streams.prefix} and {opened[0].prefix} cannot be merged: "
                    f"their manifests differ in {name}"
                )
    all_labels = [streams.manifest["labels"] for streams in opened]
    labels = all_labels[0] if all(each == all_labels[0] for each in all_labels) else {"merged": all_labels}
    with _writers_like(opened[0], prefix) as (writers, weights, manifest):
        seen = StringSet()
        for streams in opened:
            for pair in range(len(streams)):
                if (pair_id := streams.pair_id(pair)) in seen:
                    raise UserError(f"pair_id {pair_id!r} of {streams.prefix} is also in an earlier part")
                seen.add(pair_id)
                weights.add(None if streams.pair_weights is None else streams.pair_weights[pair])
            for name, writer in writers.items():
                writer.append(streams.reader(name))
        manifest |= {
            "pairs": len(seen),
            "tokens": sum(s.manifest["tokens"] for s in opened),
            "response_tokens": sum(s.manifest["response_tokens"] for s in opened),
            "longest_sequence": max(s.manifest["longest_sequence"] for s in opened),
            **_provenance(first["tokenizer"], labels),
        }
    return streams_manifest(prefix)


def split_streams(source: AlignedDataset, outputs: Sequence[str | Path], fraction: float) -> list[dict[str, Any]]:
    """Split a dataset into training (``outputs[0]``) and validation (``outputs[1]``), and return the manifests.

    Only a hash of the prompt decides: all pairs of a prompt are on one side, which they keep whatever other pairs the
    dataset has.

    Raises:
        UserError: a side would have no pairs.
    """
    tokens, prompts = source.reader(TOKENS), source.sequence_lengths[:, 0] - source.response_lengths[:, 0]
    is_validation = np.array(
        [in_validation(tokens[2 * pair][: prompts[pair]], fraction) for pair in range(len(source))], dtype=bool
    )
    manifests = []
    for output, chosen in zip(outputs, (np.flatnonzero(~is_validation), np.flatnonzero(is_validation)), strict=True):
        if not len(chosen):
            raise UserError(f"a validation share of {fraction:g} of the {len(source)} pairs leaves none for {output}")
        with _writers_like(source, output) as (writers, weights, manifest):
            for name, writer in writers.items():
                reader, sequences = source.reader(name), sequences_per_pair(name)
                for pair in chosen:
                    writer.add_document([reader[sequences * pair + i] for i in range(sequences)])
            for pair in chosen:
                weights.add(None if source.pair_weights is None else source.pair_weights[pair])
            manifest |= {
                "pairs": len(chosen),
                "tokens": int(source.sequence_lengths[chosen].sum()),
                "response_tokens": int(source.response_lengths[chosen].sum()),
                "longest_sequence": int(source.sequence_lengths[chosen].max()),
                **_provenance(source.manifest["tokenizer"], source.manifest["labels"]),
            }
        manifests.append(streams_manifest(output))
    return manifests


def in_validation(prompt: np.ndarray, fraction: float) -> bool:
    """Whether the pairs of a prompt, token ids [n], belong to the validation set: by a hash of the ids as int32."""
    digest = hashlib.sha256(prompt.astype("<i4").tobytes()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _writers_like(
    source: AlignedDataset, prefix: str | Path
) -> contextlib.AbstractContextManager[tuple[dict[str, IndexedWriter], _Weights, dict[str, Any]]]:
    manifest = source.manifest
    dtype, reference = np.dtype(manifest["token_dtype"]), manifest["reference_logprobs"]
    return _stream_writers(prefix, dtype, named_values(manifest), reference)


@contextlib.contextmanager
def _stream_writers(
    prefix: str | Path, token_dtype: np.dtype | type, values: Sequence[str], reference_logprobs: bool
) -> Iterator[tuple[dict[str, IndexedWriter], _Weights, dict[str, Any]]]:
    """Writers by name, weights and manifest to fill; all files appear together when the block ends without an error."""
    rewards = dict.fromkeys(reward_streams(values), np.float32)
    dtypes = {TOKENS: token_dtype, **rewards, REF_LOGPROBS: np.float32, PAIR_IDS: np.uint8}
    if not reference_logprobs:
        del dtypes[REF_LOGPROBS]
    paths = [path for name in (*dtypes, PAIR_WEIGHTS) for path in stream_paths(prefix, name)] + [manifest_path(prefix)]
    optional, before = stream_paths(prefix, PAIR_WEIGHTS), _reward_files(prefix)
    with atomic_write_all(paths, paths[-1], optional) as partials, contextlib.ExitStack() as open_files:
        writers = {
            name: IndexedWriter(*partials[2 * i : 2 * i + 2], dtype) for i, (name, dtype) in enumerate(dtypes.items())
        }
        for writer in writers.values():
            open_files.callback(writer.close)
        manifest: dict[str, Any] = {}
        weights = _Weights()
        yield writers, weights, manifest
        if weights.given:
            numbers = np.array(weights.values, dtype=np.float32)
            writers[PAIR_WEIGHTS] = IndexedWriter(*partials[-3:-1], np.float32)
            open_files.callback(writers[PAIR_WEIGHTS].close)
            for number in numbers:
                writers[PAIR_WEIGHTS].add_document([number[None]])
            manifest[PAIR_WEIGHTS] = weight_range(numbers)
        manifest |= {
            "token_dtype": np.dtype(token_dtype).name,
            "reference_logprobs": reference_logprobs,
            **({VALUES: list(values)} if values else {}),
            "files": {
                f"{name}.{kind}": file for name, writer in writers.items() for kind, file in writer.finish().items()
            },
        }
        partials[-1].write_text(manifest_text(MANIFEST_FORMAT, MANIFEST_VERSION, manifest), encoding="utf-8")
    for leftover in {*before, *stream_paths(prefix, REF_LOGPROBS)} - set(paths):  # of a dataset that this one replaced
        leftover.unlink(missing_ok=True)


def _reward_files(prefix: str | Path) -> list[Path]:
    """The token rewards of the dataset that is to be replaced; none if there is none, or its manifest is damaged."""
    try:
        names = reward_streams(named_values(streams_manifest(prefix)))
    except UserError:
        return []
    return [path for name in names for path in stream_paths(prefix, name)]


def open_streams(prefix: str | Path, values: str | None = None) -> AlignedDataset | BlendedDataset:
    """Open an aligned dataset or blend, with the cheap checks: sizes, counts, matching lengths, and the first and last
    bytes of every file.

    Args:
        prefix: of the dataset, or a blend (:mod:`treg_megatron.data.blend`): ``0.3 PREFIX_A 0.7 PREFIX_B``.
        values: name of the token rewards that its records hold; None or empty: the main ones.

    Raises:
        UserError: a file is missing or of another dataset, or the files do not match each other or the manifest; or
            there are no such ``values``.
    """
    if len(str(prefix).split()) < 2 or manifest_path(prefix).exists():
        return AlignedDataset(prefix, values)
    prefixes, weights = parse_blend(str(prefix))
    return BlendedDataset(str(prefix), [AlignedDataset(each, values) for each in prefixes], weights)


def verify(prefix: str | Path) -> AlignedDataset:
    """Open one aligned dataset and compare every byte with the manifest.

    Raises:
        UserError: as :func:`open_streams`, or the sha256 of a file differs from the manifest's.
    """
    streams = AlignedDataset(prefix)
    streams.require_unchanged()
    return streams


def require_same_tokenizer(manifest: dict[str, Any], tokenizer_folder: str | Path) -> None:
    """Check that the token ids of a dataset come from the tokenizer in ``tokenizer_folder``.

    Raises:
        UserError: they come from another tokenizer.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    if manifest["tokenizer"]["sha256"] != tokenizer.sha256:
        raise UserError(
            f"the aligned dataset was made with another tokenizer than that of {tokenizer_folder} "
            f"({manifest['tokenizer']['sha256'][:12]}, not {tokenizer.sha256[:12]}): label and index with "
            "the tokenizer of the model to be trained"
        )


def _provenance(tokenizer: dict[str, Any], labels: Any) -> dict[str, Any]:
    return {"alignment": ALIGNMENT, "tokenizer": tokenizer, "labels": labels}


def _write_pairs(
    writers: dict[str, IndexedWriter],
    weights: _Weights,
    values: Sequence[str],
    pairs: Iterable[LabelledPair],
    tokenizer: ChatTokenizer,
) -> dict[str, int]:
    seen = StringSet()
    tokens = response_tokens = longest = 0
    for pair in pairs:
        if max(pair.chosen_tokens.max(), pair.rejected_tokens.max()) >= tokenizer.vocab_size:
            raise UserError(
                f"pair {pair.pair_id} holds a token id that the tokenizer of {tokenizer.folder} "
                f"({tokenizer.vocab_size} tokens) does not have: it was made with another tokenizer"
            )
        if pair.pair_id in seen:
            raise UserError(f"pair_id {pair.pair_id!r} occurs twice; ids must be unique")
        seen.add(pair.pair_id)
        if (pair.chosen_ref_logprobs is not None) != (REF_LOGPROBS in writers):
            raise UserError(
                f"pair {pair.pair_id} {'lacks' if REF_LOGPROBS in writers else 'has'} reference log-probs, "
                "the pairs before it do not: give them for all pairs or for none"
            )
        if sorted(pair.chosen_values) != values:
            raise UserError(
                f"pair {pair.pair_id} has token rewards named {', '.join(sorted(pair.chosen_values)) or 'none'}, "
                f"the pairs before it {', '.join(values) or 'none'}: all pairs need the same names"
            )
        writers[TOKENS].add_document([pair.chosen_tokens, pair.rejected_tokens])
        writers[TOKEN_REWARDS].add_document([pair.chosen_token_rewards, pair.rejected_token_rewards])
        for name in values:
            writers[reward_stream(name)].add_document([pair.chosen_values[name], pair.rejected_values[name]])
        if REF_LOGPROBS in writers:
            writers[REF_LOGPROBS].add_document([pair.chosen_ref_logprobs, pair.rejected_ref_logprobs])
        writers[PAIR_IDS].add_document([np.frombuffer(pair.pair_id.encode(), dtype=np.uint8)])
        weights.add(pair.pair_weight)
        tokens += len(pair.chosen_tokens) + len(pair.rejected_tokens)
        response_tokens += len(pair.chosen_token_rewards) + len(pair.rejected_token_rewards)
        longest = max(longest, len(pair.chosen_tokens), len(pair.rejected_tokens))
    return {"pairs": len(seen), "tokens": tokens, "response_tokens": response_tokens, "longest_sequence": longest}
