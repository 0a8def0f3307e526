"""Aligned streams: labelled pairs as Megatron indexed datasets that agree document by document.

    PREFIX_tokens           uint16 or int32   prompt + response
    PREFIX_token_rewards    float32           value t belongs to response token t
    PREFIX_ref_logprobs     float32           the same; absent for reference-free runs
    PREFIX_pair_ids         uint8             the pair's name in UTF-8
    PREFIX.manifest.json                      what made them, and what they must look like

Each is a ``.bin`` and an ``.idx`` file; a document is a pair and has two sequences, chosen and rejected (one in
PREFIX_pair_ids). Rewards and log-probs are as long as the response, which is the suffix of the tokens, so the length of
the prompt needs no stream.
"""

import contextlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from treg_megatron.errors import UserError
from treg_megatron.files import atomic_write_all, manifest_text, read_manifest, sha256_of
from treg_megatron.indexed import IndexedReader, IndexedWriter
from treg_megatron.labels import LabelledPair
from treg_megatron.tokens import ChatTokenizer, load_tokenizer

MANIFEST_FORMAT, MANIFEST_VERSION = "treg-megatron streams", 1
ALIGNMENT = "value t belongs to response token t; the response is the suffix of the tokens"

TOKENS, TOKEN_REWARDS, REF_LOGPROBS, PAIR_IDS = "tokens", "token_rewards", "ref_logprobs", "pair_ids"
_UINT16_VOCABULARY = 65500            # megatron-core's own limit for two-byte tokens


class PairRecord(NamedTuple):
    """One pair of opened streams: read-only views, tokens in the stored number type, values fp32 a response token."""

    pair_id: str
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    chosen_token_rewards: np.ndarray
    rejected_token_rewards: np.ndarray
    chosen_ref_logprobs: np.ndarray | None
    rejected_ref_logprobs: np.ndarray | None


class PairStreams:
    """Streams opened for reading in any order. Made by :func:`open_streams`; pickles as its prefix.

    Attributes:
        manifest: what :func:`write_streams` wrote.
        sequence_lengths: int32 [pairs, 2], tokens of chosen and rejected, prompts included.
        response_lengths: int32 [pairs, 2], tokens of the responses.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = Path(prefix)
        self.manifest = read_manifest(manifest_path(prefix), MANIFEST_FORMAT, MANIFEST_VERSION)
        _check_sizes(self.prefix, self.manifest)
        self._tokens = _open(prefix, TOKENS, (np.uint16, np.int32))
        self._rewards = _open(prefix, TOKEN_REWARDS, (np.float32,))
        self._reference = _open(prefix, REF_LOGPROBS, (np.float32,)) if self.manifest["reference_logprobs"] else None
        self._ids = _open(prefix, PAIR_IDS, (np.uint8,))
        self._check_agreement()
        self.sequence_lengths = self._tokens.lengths.reshape(-1, 2)
        self.response_lengths = self._rewards.lengths.reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, pair: int) -> PairRecord:
        if not 0 <= pair < len(self):
            raise IndexError(f"pair {pair} of {len(self)}")
        chosen, rejected, reference = 2 * pair, 2 * pair + 1, self._reference
        return PairRecord(self.pair_id(pair), self._tokens[chosen], self._tokens[rejected],
                          self._rewards[chosen], self._rewards[rejected],
                          None if reference is None else reference[chosen],
                          None if reference is None else reference[rejected])

    def __reduce__(self):
        return open_streams, (self.prefix,)

    def pair_id(self, pair: int) -> str:
        """The name of a pair, as the file that it comes from gives it."""
        return self._ids[pair].tobytes().decode()

    def _check_agreement(self) -> None:
        pairs = self.manifest["pairs"]
        readers = {TOKENS: self._tokens, TOKEN_REWARDS: self._rewards, REF_LOGPROBS: self._reference,
                   PAIR_IDS: self._ids}
        for name, reader in readers.items():
            sequences = 1 if name == PAIR_IDS else 2
            if reader is not None and not np.array_equal(reader.document_starts, np.arange(pairs + 1) * sequences):
                raise UserError(f"{self.prefix}_{name} does not hold {pairs} documents of {sequences} sequences, as "
                                "the manifest says; index again")
        self._refuse(self._rewards.lengths < 1, "{pair}: an empty response")
        self._refuse(self._rewards.lengths >= self._tokens.lengths,
                     f"{{pair}}: {TOKEN_REWARDS} has {{rewards}} values for {{tokens}} tokens")
        if self._reference is not None:
            self._refuse(self._reference.lengths != self._rewards.lengths,
                         f"{{pair}}: {REF_LOGPROBS} has {{reference}} values where {TOKEN_REWARDS} has {{rewards}}")

    def _refuse(self, wrong_sequences: np.ndarray, message: str) -> None:
        if wrong_sequences.any():
            i = int(wrong_sequences.argmax())
            told = message.format(
                pair=f"pair {i // 2} ({self.pair_id(i // 2)}, {'rejected' if i % 2 else 'chosen'})",
                tokens=self._tokens.lengths[i], rewards=self._rewards.lengths[i],
                reference=None if self._reference is None else self._reference.lengths[i])
            raise UserError(f"streams {self.prefix} disagree: {told}; index again")


def write_streams(prefix: str | Path, pairs: Iterable[LabelledPair], tokenizer: ChatTokenizer,
                  labels: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write labelled pairs as aligned streams; all files appear together at the end, or none does.

    Args:
        tokenizer: the one that made the tokens; its hashes go into the manifest.
        labels: what made the labels, for the manifest.

    Returns:
        The manifest.

    Raises:
        UserError: no pairs, a token that the tokenizer does not have, a pair_id that comes twice, pairs with and
            without reference log-probs, a folder that cannot be written.
    """
    pairs = iter(pairs)
    first = next(pairs, None)
    if first is None:
        raise UserError(f"there are no pairs to write to {prefix}")
    token_dtype = np.dtype(np.uint16 if tokenizer.vocab_size < _UINT16_VOCABULARY else np.int32)
    dtypes = {TOKENS: token_dtype, TOKEN_REWARDS: np.float32, REF_LOGPROBS: np.float32, PAIR_IDS: np.uint8}
    if first.chosen_ref_logprobs is None:
        del dtypes[REF_LOGPROBS]
    paths = [path for name in dtypes for path in stream_paths(prefix, name)] + [manifest_path(prefix)]
    with atomic_write_all(paths, replaced_first=paths[-1]) as partials, contextlib.ExitStack() as open_files:
        writers = {name: IndexedWriter(*partials[2 * i:2 * i + 2], dtype)
                   for i, (name, dtype) in enumerate(dtypes.items())}
        for writer in writers.values():
            open_files.callback(writer.close)
        counts = _write_pairs(writers, itertools.chain([first], pairs), tokenizer)
        manifest = {
            **counts,
            "alignment": ALIGNMENT,
            "token_dtype": token_dtype.name,
            "reference_logprobs": REF_LOGPROBS in dtypes,
            "tokenizer": {"sha256": tokenizer.sha256, "chat_template_sha256": tokenizer.template_sha256,
                          "vocab_size": tokenizer.vocab_size},
            "labels": labels,
            "files": {f"{name}.{kind}": file for name, writer in writers.items()
                      for kind, file in writer.finish().items()},
        }
        partials[-1].write_text(manifest_text(MANIFEST_FORMAT, MANIFEST_VERSION, manifest), encoding="utf-8")
    if REF_LOGPROBS not in dtypes:
        for leftover in stream_paths(prefix, REF_LOGPROBS):      # of streams that these ones replaced
            leftover.unlink(missing_ok=True)
    return read_manifest(paths[-1], MANIFEST_FORMAT, MANIFEST_VERSION)


def open_streams(prefix: str | Path) -> PairStreams:
    """Open aligned streams and check what is cheap to check: sizes, counts, and lengths against each other.

    Raises:
        UserError: a missing or foreign file, or streams that do not fit each other or their manifest.
    """
    return PairStreams(prefix)


def verify(prefix: str | Path) -> PairStreams:
    """:func:`open_streams`, and every byte against the manifest.

    Raises:
        UserError: also where a file's sha256 is another than the manifest's.
    """
    streams = open_streams(prefix)
    for path, file in _files(streams.prefix, streams.manifest):
        if sha256_of(path) != file["sha256"]:
            raise UserError(f"{path} has changed since it was written (its sha256 is not the manifest's); index again")
    return streams


def require_same_tokenizer(manifest: dict[str, Any], tokenizer_folder: str | Path) -> None:
    """Check that streams hold ids of the tokenizer in ``tokenizer_folder``.

    Raises:
        UserError: they were made with another one.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    if manifest["tokenizer"]["sha256"] != tokenizer.sha256:
        raise UserError(f"the streams were made with another tokenizer than that of {tokenizer_folder} "
                        f"({manifest['tokenizer']['sha256'][:12]}, not {tokenizer.sha256[:12]}): label and index with "
                        "the tokenizer of the model that is trained")


def stream_paths(prefix: str | Path, name: str) -> tuple[Path, Path]:
    """The .bin and .idx file of one stream."""
    return Path(f"{prefix}_{name}.bin"), Path(f"{prefix}_{name}.idx")


def manifest_path(prefix: str | Path) -> Path:
    """The manifest of the streams PREFIX."""
    return Path(f"{prefix}.manifest.json")


def _write_pairs(writers: dict[str, IndexedWriter], pairs: Iterable[LabelledPair],
                 tokenizer: ChatTokenizer) -> dict[str, int]:
    id_hashes: set[int] = set()
    tokens = response_tokens = longest = 0
    for pair in pairs:
        if max(pair.chosen_tokens.max(), pair.rejected_tokens.max()) >= tokenizer.vocab_size:
            raise UserError(f"pair {pair.pair_id} holds a token id that the tokenizer of {tokenizer.folder} "
                            f"({tokenizer.vocab_size} tokens) does not have: it was made with another one")
        if (id_hash := hash(pair.pair_id)) in id_hashes:
            raise UserError(f"pair_id {pair.pair_id!r} comes twice; ids must be unique")
        id_hashes.add(id_hash)
        if (pair.chosen_ref_logprobs is not None) != (REF_LOGPROBS in writers):
            raise UserError(f"pair {pair.pair_id} {'lacks' if REF_LOGPROBS in writers else 'has'} reference log-probs, "
                            "the pairs before it do not: give them for all pairs or for none")
        writers[TOKENS].add_document([pair.chosen_tokens, pair.rejected_tokens])
        writers[TOKEN_REWARDS].add_document([pair.chosen_token_rewards, pair.rejected_token_rewards])
        if REF_LOGPROBS in writers:
            writers[REF_LOGPROBS].add_document([pair.chosen_ref_logprobs, pair.rejected_ref_logprobs])
        writers[PAIR_IDS].add_document([np.frombuffer(pair.pair_id.encode(), dtype=np.uint8)])
        tokens += len(pair.chosen_tokens) + len(pair.rejected_tokens)
        response_tokens += len(pair.chosen_token_rewards) + len(pair.rejected_token_rewards)
        longest = max(longest, len(pair.chosen_tokens), len(pair.rejected_tokens))
    return {"pairs": len(id_hashes), "tokens": tokens, "response_tokens": response_tokens, "longest_sequence": longest}


def _open(prefix: str | Path, name: str, dtypes: tuple[type, ...]) -> IndexedReader:
    reader = IndexedReader(*stream_paths(prefix, name))
    if reader.dtype not in dtypes:
        raise UserError(f"{prefix}_{name} holds {reader.dtype} numbers instead of "
                        f"{' or '.join(np.dtype(dtype).name for dtype in dtypes)}; index again")
    return reader


def _check_sizes(prefix: Path, manifest: dict[str, Any]) -> None:
    for path, file in _files(prefix, manifest):
        if not path.is_file():
            raise UserError(f"{path} does not exist, but {manifest_path(prefix)} lists it; index again")
        if path.stat().st_size != file["bytes"]:
            raise UserError(f"{path} has {path.stat().st_size} bytes, its manifest says {file['bytes']}: it was cut, "
                            "or belongs to other streams; index again")


def _files(prefix: Path, manifest: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    return [(Path(f"{prefix}_{name}"), file) for name, file in manifest["files"].items()]
