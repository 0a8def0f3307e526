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
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from treg_megatron.errors import UserError
from treg_megatron.files import atomic_write_all, manifest_text, read_manifest, sha256_of
from treg_megatron.indexed import IndexedReader, IndexedWriter, ends_of
from treg_megatron.labels import LabelledPair
from treg_megatron.seen import Seen
from treg_megatron.tokens import ChatTokenizer, load_tokenizer

if TYPE_CHECKING:
    from treg_megatron.blend import BlendedStreams

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
        self.manifest = _read_manifest(prefix)
        _check_sizes(self.prefix, self.manifest)
        self._tokens = _open(prefix, TOKENS, (np.uint16, np.int32))
        self._rewards = _open(prefix, TOKEN_REWARDS, (np.float32,))
        self._reference = _open(prefix, REF_LOGPROBS, (np.float32,)) if self.manifest["reference_logprobs"] else None
        self._ids = _open(prefix, PAIR_IDS, (np.uint8,))
        self._check_agreement()
        for path, file in _files(self.prefix, self.manifest):
            if ends_of(path) != file["ends"]:
                raise _changed(path)
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
        return PairStreams, (self.prefix,)

    def reader(self, name: str) -> IndexedReader:
        """One stream as it lies on disk; REF_LOGPROBS must be there."""
        return {TOKENS: self._tokens, TOKEN_REWARDS: self._rewards, REF_LOGPROBS: self._reference,
                PAIR_IDS: self._ids}[name]

    def pair_id(self, pair: int) -> str:
        """The name of a pair, as the file that it comes from gives it."""
        return self._ids[pair].tobytes().decode()

    def require_unchanged(self) -> None:
        """Compare every byte with the manifest.

        Raises:
            UserError: a file's sha256 is another than the manifest's.
        """
        for path, file in _files(self.prefix, self.manifest):
            if sha256_of(path) != file["sha256"]:
                raise _changed(path)

    def _check_agreement(self) -> None:
        pairs = self.manifest["pairs"]
        if pairs < 1:
            raise UserError(f"streams {self.prefix} hold no pairs; index again")
        readers = {TOKENS: self._tokens, TOKEN_REWARDS: self._rewards, REF_LOGPROBS: self._reference,
                   PAIR_IDS: self._ids}
        for name, reader in readers.items():
            sequences = 1 if name == PAIR_IDS else 2
            if reader is not None and (len(reader.document_starts) != pairs + 1 or not np.array_equal(
                    reader.document_starts, np.arange(pairs + 1) * sequences)):
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
    token_dtype = np.uint16 if tokenizer.vocab_size < _UINT16_VOCABULARY else np.int32
    with _stream_writers(prefix, token_dtype, first.chosen_ref_logprobs is not None) as (writers, manifest):
        manifest |= _write_pairs(writers, itertools.chain([first], pairs), tokenizer)
        manifest |= {"alignment": ALIGNMENT,
                     "tokenizer": {"sha256": tokenizer.sha256, "chat_template_sha256": tokenizer.template_sha256,
                                   "vocab_size": tokenizer.vocab_size},
                     "labels": labels}
    return _read_manifest(prefix)


def merge_streams(prefix: str | Path, parts: Sequence[str | Path]) -> dict[str, Any]:
    """Write the pairs of several streams one after the other, in the order of ``parts``, and return the manifest.

    Raises:
        UserError: parts that were made with different tokenizers or by different labelling runs, only some with
            reference log-probs, a pair_id that comes twice, or a part that is the output.
    """
    if not parts:
        raise UserError(f"there are no streams to merge to {prefix}")
    if Path(prefix).resolve() in (Path(part).resolve() for part in parts):
        raise UserError(f"streams {prefix} cannot be merged into themselves; name another output")
    opened = [verify(part) for part in parts]
    first = opened[0].manifest
    for streams in opened[1:]:
        for name in ("tokenizer", "token_dtype", "reference_logprobs"):
            if streams.manifest[name] != first[name]:
                raise UserError(f"streams {streams.prefix} and {opened[0].prefix} do not go together: "
                                f"their manifests differ in {name}")
    all_labels = [streams.manifest["labels"] for streams in opened]
    labels = all_labels[0] if all(each == all_labels[0] for each in all_labels) else {"merged": all_labels}
    with _stream_writers(prefix, np.dtype(first["token_dtype"]), first["reference_logprobs"]) as (writers, manifest):
        seen = Seen()
        for streams in opened:
            for pair in range(len(streams)):
                if (pair_id := streams.pair_id(pair)) in seen:
                    raise UserError(f"pair_id {pair_id!r} of {streams.prefix} is in an earlier part, too")
                seen.add(pair_id)
            for name, writer in writers.items():
                writer.append(streams.reader(name))
        manifest |= {"pairs": len(seen), "tokens": sum(s.manifest["tokens"] for s in opened),
                     "response_tokens": sum(s.manifest["response_tokens"] for s in opened),
                     "longest_sequence": max(s.manifest["longest_sequence"] for s in opened),
                     "alignment": ALIGNMENT, "tokenizer": first["tokenizer"], "labels": labels}
    return _read_manifest(prefix)


def split_streams(source: PairStreams, outputs: Sequence[str | Path], fraction: float) -> list[dict[str, Any]]:
    """Divide streams into training (``outputs[0]``) and validation (``outputs[1]``), and return the manifests.

    A hash of pair_id alone decides, so a pair stays on its side whatever else the streams hold.

    Raises:
        UserError: a side without pairs.
    """
    is_validation = np.array([in_validation(source.pair_id(pair), fraction) for pair in range(len(source))])
    manifests = []
    for output, chosen in zip(outputs, (np.flatnonzero(~is_validation), np.flatnonzero(is_validation))):
        if not len(chosen):
            raise UserError(f"a validation share of {fraction:g} of the {len(source)} pairs leaves none for {output}")
        with _stream_writers(output, np.dtype(source.manifest["token_dtype"]),
                             source.manifest["reference_logprobs"]) as (writers, manifest):
            for name, writer in writers.items():
                reader, sequences = source.reader(name), 1 if name == PAIR_IDS else 2
                for pair in chosen:
                    writer.add_document([reader[sequences * pair + i] for i in range(sequences)])
            manifest |= {"pairs": len(chosen), "tokens": int(source.sequence_lengths[chosen].sum()),
                         "response_tokens": int(source.response_lengths[chosen].sum()),
                         "longest_sequence": int(source.sequence_lengths[chosen].max()), "alignment": ALIGNMENT,
                         "tokenizer": source.manifest["tokenizer"], "labels": source.manifest["labels"]}
        manifests.append(_read_manifest(output))
    return manifests


def in_validation(pair_id: str, fraction: float) -> bool:
    """Whether a pair belongs to the validation share: the same answer on every machine."""
    return int.from_bytes(hashlib.sha256(pair_id.encode()).digest()[:8], "big") < fraction * 2**64


@contextlib.contextmanager
def _stream_writers(prefix: str | Path, token_dtype: np.dtype | type,
                    reference_logprobs: bool) -> Iterator[tuple[dict[str, IndexedWriter], dict[str, Any]]]:
    """Writers by stream and the manifest to fill; when the block ends well, all files appear together."""
    dtypes = {TOKENS: token_dtype, TOKEN_REWARDS: np.float32, REF_LOGPROBS: np.float32, PAIR_IDS: np.uint8}
    if not reference_logprobs:
        del dtypes[REF_LOGPROBS]
    paths = [path for name in dtypes for path in stream_paths(prefix, name)] + [manifest_path(prefix)]
    with atomic_write_all(paths, replaced_first=paths[-1]) as partials, contextlib.ExitStack() as open_files:
        writers = {name: IndexedWriter(*partials[2 * i:2 * i + 2], dtype)
                   for i, (name, dtype) in enumerate(dtypes.items())}
        for writer in writers.values():
            open_files.callback(writer.close)
        manifest: dict[str, Any] = {}
        yield writers, manifest
        manifest |= {"token_dtype": np.dtype(token_dtype).name, "reference_logprobs": reference_logprobs,
                     "files": {f"{name}.{kind}": file for name, writer in writers.items()
                               for kind, file in writer.finish().items()}}
        partials[-1].write_text(manifest_text(MANIFEST_FORMAT, MANIFEST_VERSION, manifest), encoding="utf-8")
    if not reference_logprobs:
        for leftover in stream_paths(prefix, REF_LOGPROBS):      # of streams that these ones replaced
            leftover.unlink(missing_ok=True)


def open_streams(prefix: str | Path) -> "PairStreams | BlendedStreams":
    """Open aligned streams and check what is cheap to check: sizes, counts, lengths against each other,
    and the first and last bytes of every file.

    Args:
        prefix: of the streams, or several as :mod:`treg_megatron.blend` reads them: ``0.3 PREFIX_A 0.7 PREFIX_B``.

    Raises:
        UserError: a missing or foreign file, or streams that do not fit each other or their manifest.
    """
    if len(str(prefix).split()) < 2 or manifest_path(prefix).exists():
        return PairStreams(prefix)
    from treg_megatron.blend import BlendedStreams, parse_blend

    prefixes, weights = parse_blend(str(prefix))
    return BlendedStreams(str(prefix), [PairStreams(each) for each in prefixes], weights)


def verify(prefix: str | Path) -> PairStreams:
    """:func:`open_streams`, and every byte against the manifest.

    Raises:
        UserError: also where a file's sha256 is another than the manifest's.
    """
    streams = PairStreams(prefix)
    streams.require_unchanged()
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
    seen = Seen()
    tokens = response_tokens = longest = 0
    for pair in pairs:
        if max(pair.chosen_tokens.max(), pair.rejected_tokens.max()) >= tokenizer.vocab_size:
            raise UserError(f"pair {pair.pair_id} holds a token id that the tokenizer of {tokenizer.folder} "
                            f"({tokenizer.vocab_size} tokens) does not have: it was made with another one")
        if pair.pair_id in seen:
            raise UserError(f"pair_id {pair.pair_id!r} comes twice; ids must be unique")
        seen.add(pair.pair_id)
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
    return {"pairs": len(seen), "tokens": tokens, "response_tokens": response_tokens, "longest_sequence": longest}


_MANIFEST_KEYS = {"pairs": int, "tokens": int, "response_tokens": int, "longest_sequence": int, "alignment": str,
                  "token_dtype": str, "reference_logprobs": bool, "tokenizer": dict, "files": dict}
_FILE_KEYS = {"bytes": int, "sha256": str, "ends": str}
_TOKENIZER_KEYS = {"sha256": str, "chat_template_sha256": str, "vocab_size": int}


def _read_manifest(prefix: str | Path) -> dict[str, Any]:
    path = manifest_path(prefix)
    manifest = read_manifest(path, MANIFEST_FORMAT, MANIFEST_VERSION)
    _require_keys(manifest, _MANIFEST_KEYS, path, "")
    _require_keys(manifest["tokenizer"], _TOKENIZER_KEYS, path, "tokenizer.")
    names = [TOKENS, TOKEN_REWARDS, *[REF_LOGPROBS] * manifest["reference_logprobs"], PAIR_IDS]
    files = {f"{name}.{kind}": dict for name in names for kind in ("bin", "idx")}
    _require_keys(manifest["files"], files, path, "files.")
    for name, file in manifest["files"].items():
        if name.partition(".")[0] not in names:
            raise UserError(f"{path}: files names {name!r}, which is no stream of these; index again")
        _require_keys(file, _FILE_KEYS, path, f"files.{name}.")
    manifest.setdefault("labels", None)
    return manifest


def _require_keys(found: dict[str, Any], expected: dict[str, type], path: Path, where: str) -> None:
    for key, type in expected.items():
        value = found.get(key)
        if not isinstance(value, type) or (type is int and (isinstance(value, bool) or value < 0)):
            raise UserError(f"{path}: {where}{key} is {'missing' if key not in found else repr(value)[:60]}, where "
                            f"{type.__name__} is due; index again")


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


def _changed(path: Path) -> UserError:
    return UserError(f"{path} has changed since it was written, or belongs to other streams: its hash is not the "
                     "manifest's; index again")


def _files(prefix: Path, manifest: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    return [(Path(f"{prefix}_{name}"), file) for name, file in manifest["files"].items()]
