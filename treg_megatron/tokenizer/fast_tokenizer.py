"""A fast tokenizer of Hugging Face as an encoder, and the hash of what determines its ids."""

import functools
import json
from typing import Any

from treg_megatron.tokenizer.word_cache import TokenCache, known_cuts
from treg_megatron.utils.files import sha256_of_json


class FastEngine:
    """A fast tokenizer's own encoder, with padding and truncation turned off."""

    def __init__(self, tokenizer: Any):
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        cuts = known_cuts(self._backend)
        self._memories = (
            None
            if cuts is None
            else {
                special: TokenCache(functools.partial(self.encode_whole, special=special), cuts)
                for special in (True, False)
            }
        )

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of a text; ``special`` says whether special tokens are recognised in it."""
        return self._memories[special].encode(text) if self._memories else self.encode_whole(text, special).ids

    def encode_with_spans(self, text: str) -> tuple[list[int], Any]:
        """Ids of a text without special tokens, and the character span of each."""
        if self._memories:
            return self._memories[False].encode_with_spans(text)
        encoded = self.encode_whole(text, False)
        return encoded.ids, encoded.offsets

    def encode_whole(self, text: str, special: bool) -> Any:
        """The tokenizer's own encoding of a text, with ``ids`` and ``offsets``."""
        self._backend.encode_special_tokens = not special
        return self._backend.encode(text, add_special_tokens=False)


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of vocabulary, merges, normalisation, pre-tokenization and added tokens."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return sha256_of_json({name: parts[name] for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")})
