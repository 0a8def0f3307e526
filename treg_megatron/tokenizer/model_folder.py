"""Hugging Face folders on this machine: what a path may name instead, and tokenizers too large for their model."""

import contextlib
import re
from pathlib import Path
from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.utils.files import read_json

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

# Where the hub's cache keeps the folders of its models, as seen from the cache or from one model in it.
IN_CACHE = ("snapshots/*/config.json", "models--*/snapshots/*/config.json", "*/config.json")


def existing_folder(folder: str | Path, what: str = "Hugging Face folder") -> Path:
    """``folder`` as a path, ``~`` expanded.

    Raises:
        UserError: there is no such folder; the message says how to get one where ``folder`` looks like a model's id on
            the hub.
    """
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file; name the {what} that it is in")
    hint = ""
    if HUB_ID.fullmatch(str(folder)) and not path.parent.exists():
        hint = f"; to use that model of the hub, download it first: hf download {folder} --local-dir {folder}"
    raise UserError(f"{what} {path} does not exist{hint}")


def model_folder(folder: str | Path) -> Path:
    """``folder`` as a path, ``~`` expanded.

    Raises:
        UserError: it does not exist, has no config.json, or holds an adapter for another model.
    """
    path = existing_folder(folder)
    if (path / "adapter_config.json").exists():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise UserError(
            f"{path} holds an adapter (adapter_config.json) for the model {base}, not a model: merge the two first, "
            "by peft's merge_and_unload"
        )
    if not (path / "config.json").exists():
        elsewhere = [found.parent for pattern in IN_CACHE for found in sorted(path.glob(pattern))]
        hint = f"; did you mean {elsewhere[-1]}?" if elsewhere else ""
        raise UserError(f"{path} is not a model folder: {path / 'config.json'} does not exist{hint}")
    return path


def require_embeddings(tokens: int, vocabulary: int, folder: str | Path) -> None:
    """Require that a model with ``vocabulary`` embeddings has one for each of the ``tokens`` ids of its tokenizer.

    Raises:
        UserError: it has fewer.
    """
    if tokens > vocabulary:
        raise UserError(
            f"the tokenizer of {folder} has {tokens} tokens, but its model embeds only {vocabulary}: use the model's "
            "own tokenizer, or resize the model's embeddings"
        )


def tokens_in_folder(folder: Path) -> int:
    """How many ids the tokenizer in a folder uses, by its files alone; 0 if it has none that we can read.

    Raises:
        UserError: one of the files is not JSON.
    """
    ids = [-1]
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json"):
        if (folder / name).exists():
            ids += _ids(name, read_json(folder / name))
    if not (folder / "tokenizer.json").exists() and (folder / "tokenizer.model").exists():
        from sentencepiece import SentencePieceProcessor

        with contextlib.suppress(RuntimeError, OSError):  # a file of another kind under the same name
            ids.append(SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size() - 1)
    return max(ids) + 1


def _ids(name: str, content: dict[str, Any]) -> list[int]:
    """The ids in a JSON file of a tokenizer; none where its layout is not the usual one."""
    ids: list[Any] = []
    if name == "tokenizer.json":
        model = _dict(content.get("model"))
        unigram, added = model.get("vocab"), content.get("added_tokens")
        ids += _dict(model.get("vocab")).values()
        ids += range(len(unigram)) if isinstance(unigram, list) else ()
        ids += (_dict(token).get("id") for token in added) if isinstance(added, list) else ()
    elif name == "tokenizer_config.json":
        ids += (int(token) for token in _dict(content.get("added_tokens_decoder")) if token.isdecimal())
    else:
        ids += content.values()
    return [token for token in ids if isinstance(token, int)]


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
