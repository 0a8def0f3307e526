"""Reader of aligned datasets: labelled pairs, stored as Megatron indexed datasets with matching documents.

    PREFIX_tokens           uint16 or int32   prompt + response
    PREFIX_token_rewards    float32           value t belongs to response token t
    PREFIX_token_rewards_X  float32           the same: further token rewards, under the name X
    PREFIX_ref_logprobs     float32           the same; absent for reference-free runs
    PREFIX_pair_ids         uint8             the pair's id in UTF-8
    PREFIX_pair_weights     float32           factor of the pair's loss; absent if no pair has one
    PREFIX.manifest.json                      provenance, sizes and hashes

Each is a ``.bin`` and an ``.idx`` file. A document is a pair and has two sequences, chosen and rejected (one in
PREFIX_pair_ids and PREFIX_pair_weights). Rewards and log-probs are as long as the response, which is the suffix of the
tokens, so prompt lengths need not be stored. :mod:`treg_megatron.data.streams` writes, merges, splits and opens these
datasets.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from treg_megatron.data.indexed import IndexedReader, ends_of
from treg_megatron.errors import UserError
from treg_megatron.utils.files import read_manifest, sha256_of

MANIFEST_FORMAT, MANIFEST_VERSION = "treg-megatron streams", 1
ALIGNMENT = "value t belongs to response token t; the response is the suffix of the tokens"

TOKENS, TOKEN_REWARDS, REF_LOGPROBS, PAIR_IDS = "tokens", "token_rewards", "ref_logprobs", "pair_ids"
PAIR_WEIGHTS = "pair_weights"
VALUES = "values"  # in manifests that have named token rewards
VALUES_NAME = "[a-z0-9_]+"
_ONE_PER_PAIR = (PAIR_IDS, PAIR_WEIGHTS)


class PairRecord(NamedTuple):
    """One pair: read-only views; tokens uint16 or int32 [s], rewards and log-probs fp32 [response tokens].

    The weight is None in a dataset without weights.
    """

    pair_id: str
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    chosen_token_rewards: np.ndarray
    rejected_token_rewards: np.ndarray
    chosen_ref_logprobs: np.ndarray | None
    rejected_ref_logprobs: np.ndarray | None
    pair_weight: float | None = None


class AlignedDataset:
    """Aligned dataset with random access to its pairs. Created by :func:`open_streams`; pickled as its prefix.

    Args:
        prefix: of its files.
        values: name of the token rewards that its records hold; None or empty: the main ones.

    Attributes:
        manifest: the manifest, as :func:`write_streams` wrote it.
        sequence_lengths: int32 [pairs, 2], tokens of the chosen and rejected sequences, prompt included.
        response_lengths: int32 [pairs, 2], tokens of the chosen and rejected responses.
        pair_weights: float32 [pairs], or None if the dataset has none.

    Raises:
        UserError: a file is missing, damaged or from another dataset, or the files disagree.
    """

    def __init__(self, prefix: str | Path, values: str | None = None):
        self.prefix, self.values = Path(prefix), values
        self.manifest = streams_manifest(prefix)
        names = named_values(self.manifest)
        if values and values not in names:
            raise UserError(
                f"aligned dataset {prefix} has no token rewards named {values}, only "
                f"{', '.join(names) or 'the main ones'}: set objective.values to one of its names, or null for the main"
            )
        _check_sizes(self.prefix, self.manifest)
        self._tokens = _open(prefix, TOKENS, (np.uint16, np.int32))
        self._all_rewards = {name: _open(prefix, name, (np.float32,)) for name in reward_streams(names)}
        self._rewards = self._all_rewards[TOKEN_REWARDS]
        self._named_rewards = self._all_rewards[reward_stream(values)]
        self._reference = _open(prefix, REF_LOGPROBS, (np.float32,)) if self.manifest["reference_logprobs"] else None
        self._ids = _open(prefix, PAIR_IDS, (np.uint8,))
        self._weights = _open(prefix, PAIR_WEIGHTS, (np.float32,)) if PAIR_WEIGHTS in self.manifest else None
        self._check_agreement()
        for path, file in _files(self.prefix, self.manifest):
            if ends_of(path) != file["ends"]:
                raise _changed(path)
        self.sequence_lengths = self._tokens.lengths.reshape(-1, 2)
        self.response_lengths = self._rewards.lengths.reshape(-1, 2)
        self.pair_weights = None if self._weights is None else self._weights.numbers

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, pair: int) -> PairRecord:
        if not 0 <= pair < len(self):
            raise IndexError(f"pair {pair} of {len(self)}")
        chosen, rejected, reference = 2 * pair, 2 * pair + 1, self._reference
        rewards = self._named_rewards
        return PairRecord(
            self.pair_id(pair),
            self._tokens[chosen],
            self._tokens[rejected],
            rewards[chosen],
            rewards[rejected],
            None if reference is None else reference[chosen],
            None if reference is None else reference[rejected],
            None if self.pair_weights is None else float(self.pair_weights[pair]),
        )

    def __reduce__(self):
        return AlignedDataset, (self.prefix, self.values)

    def reader(self, name: str) -> IndexedReader:
        """The indexed dataset ``name``, which must be present."""
        return self._readers()[name]

    def _readers(self) -> dict[str, IndexedReader]:
        readers = {
            TOKENS: self._tokens,
            **self._all_rewards,
            REF_LOGPROBS: self._reference,
            PAIR_IDS: self._ids,
            PAIR_WEIGHTS: self._weights,
        }
        return {name: reader for name, reader in readers.items() if reader is not None}

    def pair_id(self, pair: int) -> str:
        """Id of a pair, as given in its source file."""
        return self._ids[pair].tobytes().decode()

    def require_unchanged(self) -> None:
        """Compare every byte with the manifest.

        Raises:
            UserError: the sha256 of a file differs from the manifest's.
        """
        for path, file in _files(self.prefix, self.manifest):
            if sha256_of(path) != file["sha256"]:
                raise _changed(path)

    def _check_agreement(self) -> None:
        pairs = self.manifest["pairs"]
        if pairs < 1:
            raise UserError(f"aligned dataset {self.prefix} holds no pairs; index again")
        for name, reader in self._readers().items():
            sequences = sequences_per_pair(name)
            if len(reader.document_starts) != pairs + 1 or not np.array_equal(
                reader.document_starts, np.arange(pairs + 1) * sequences
            ):
                raise UserError(
                    f"{self.prefix}_{name} does not hold {pairs} documents of {sequences} sequences, as "
                    "the manifest says; index again"
                )
        self._refuse(self._rewards.lengths < 1, "{pair}: an empty response")
        self._refuse(
            self._rewards.lengths >= self._tokens.lengths,
            f"{{pair}}: {TOKEN_REWARDS} has {{rewards}} values for {{tokens}} tokens",
        )
        for name, named in self._all_rewards.items():
            self._refuse(
                named.lengths != self._rewards.lengths, f"{{pair}}: {name} and {TOKEN_REWARDS} differ in length"
            )
        if self._reference is not None:
            self._refuse(
                self._reference.lengths != self._rewards.lengths,
                f"{{pair}}: {REF_LOGPROBS} has {{reference}} values where {TOKEN_REWARDS} has {{rewards}}",
            )

        if self._weights is not None and len(self._weights.numbers) != pairs:
            raise UserError(
                f"{self.prefix}_{PAIR_WEIGHTS} has {len(self._weights.numbers)} weights for {pairs} pairs; index again"
            )

    def _refuse(self, wrong_sequences: np.ndarray, message: str) -> None:
        if wrong_sequences.any():
            i = int(wrong_sequences.argmax())
            detail = message.format(
                pair=f"pair {i // 2} ({self.pair_id(i // 2)}, {'rejected' if i % 2 else 'chosen'})",
                tokens=self._tokens.lengths[i],
                rewards=self._rewards.lengths[i],
                reference=None if self._reference is None else self._reference.lengths[i],
            )
            raise UserError(f"the files of aligned dataset {self.prefix} disagree: {detail}; index again")


def named_values(manifest: dict[str, Any]) -> list[str]:
    """The names of a dataset's further token rewards, sorted."""
    return manifest.get(VALUES, [])


def reward_stream(values: str | None) -> str:
    """The indexed dataset of the token rewards of a name; without a name, of the main ones."""
    return f"{TOKEN_REWARDS}_{values}" if values else TOKEN_REWARDS


def reward_streams(names: Iterable[str]) -> list[str]:
    """The indexed datasets of token rewards, the main ones first."""
    return [reward_stream(name) for name in (None, *names)]


def weight_range(weights: np.ndarray) -> dict[str, float]:
    """What a manifest says of weights, [pairs] fp32."""
    return {"least": float(weights.min()), "greatest": float(weights.max())}


def sequences_per_pair(name: str) -> int:
    """How many sequences a pair has in the indexed dataset ``name``."""
    return 1 if name in _ONE_PER_PAIR else 2


def stream_paths(prefix: str | Path, name: str) -> tuple[Path, Path]:
    """The .bin and .idx path of one indexed dataset of PREFIX."""
    return Path(f"{prefix}_{name}.bin"), Path(f"{prefix}_{name}.idx")


def manifest_path(prefix: str | Path) -> Path:
    """Path of the manifest of the aligned dataset PREFIX."""
    return Path(f"{prefix}.manifest.json")


_MANIFEST_KEYS = {
    "pairs": int,
    "tokens": int,
    "response_tokens": int,
    "longest_sequence": int,
    "alignment": str,
    "token_dtype": str,
    "reference_logprobs": bool,
    "tokenizer": dict,
    "files": dict,
}
_FILE_KEYS = {"bytes": int, "sha256": str, "ends": str}
_TOKENIZER_KEYS = {"sha256": str, "chat_template_sha256": str, "vocab_size": int}


def streams_manifest(prefix: str | Path) -> dict[str, Any]:
    """Read the manifest of the aligned dataset PREFIX, checking that every key is present and has the right type.

    Raises:
        UserError: the manifest is missing or invalid.
    """
    path = manifest_path(prefix)
    manifest = read_manifest(path, MANIFEST_FORMAT, MANIFEST_VERSION)
    _require_keys(manifest, _MANIFEST_KEYS, path, "")
    _require_keys(manifest["tokenizer"], _TOKENIZER_KEYS, path, "tokenizer.")
    if VALUES in manifest:
        _require_keys(manifest, {VALUES: list}, path, "")
        if wrong := [name for name in manifest[VALUES] if not re.fullmatch(VALUES_NAME, str(name))]:
            raise UserError(
                f"{path}: {wrong[0]!r} under values is not a name of token rewards ({VALUES_NAME}); index again"
            )
    names = [TOKENS, *reward_streams(named_values(manifest))]
    names += [*[REF_LOGPROBS] * manifest["reference_logprobs"], PAIR_IDS]
    if PAIR_WEIGHTS in manifest:
        _require_keys(manifest, {PAIR_WEIGHTS: dict}, path, "")
        names.append(PAIR_WEIGHTS)
    files = {f"{name}.{kind}": dict for name in names for kind in ("bin", "idx")}
    _require_keys(manifest["files"], files, path, "files.")
    for name, file in manifest["files"].items():
        if name.partition(".")[0] not in names:
            raise UserError(f"{path}: files names {name!r}, which is not part of this dataset; index again")
        _require_keys(file, _FILE_KEYS, path, f"files.{name}.")
    manifest.setdefault("labels", None)
    return manifest


def _require_keys(found: dict[str, Any], expected: dict[str, type], path: Path, where: str) -> None:
    for key, type in expected.items():
        value = found.get(key)
        if not isinstance(value, type) or (type is int and (isinstance(value, bool) or value < 0)):
            raise UserError(
                f"{path}: {where}{key} is {'missing' if key not in found else repr(value)[:60]}, but "
                f"{type.__name__} is expected; index again"
            )


def _open(prefix: str | Path, name: str, dtypes: tuple[type, ...]) -> IndexedReader:
    reader = IndexedReader(*stream_paths(prefix, name))
    if reader.dtype not in dtypes:
        raise UserError(
            f"{prefix}_{name} holds {reader.dtype} numbers instead of "
            f"{' or '.join(np.dtype(dtype).name for dtype in dtypes)}; index again"
        )
    return reader


def _check_sizes(prefix: Path, manifest: dict[str, Any]) -> None:
    for path, file in _files(prefix, manifest):
        if not path.is_file():
            raise UserError(f"{path} does not exist, but {manifest_path(prefix)} lists it; index again")
        if path.stat().st_size != file["bytes"]:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes, its manifest says {file['bytes']}: it was truncated, "
                "or belongs to another dataset; index again"
            )


def _changed(path: Path) -> UserError:
    return UserError(
        f"{path} has changed since it was written, or belongs to another dataset: its hash differs from "
        "the manifest's; index again"
    )


def _files(prefix: Path, manifest: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    return [(Path(f"{prefix}_{name}"), file) for name, file in manifest["files"].items()]
