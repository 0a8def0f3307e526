"""SentencePiece backend for :class:`~treg_megatron.tokenizer.chat.ChatTokenizer`, from a ``.model`` file.

Text is encoded literally: SentencePiece's dummy prefix and removal of extra white space are turned off, because the
chat template decides where spaces go. The control tokens are the model's, and the template in the same folder
(``chat_template.jinja``) writes them.
"""

import re
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.utils.files import sha256_of_json

TEMPLATE_NAME = "chat_template.jinja"


class SentencePieceTokenizer:
    """The part of Hugging Face's tokenizer interface that we use.

    Raises:
        UserError: the file is not a SentencePiece model, its normaliser rewrites text, or there is no chat template
            next to it.
    """

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        # its own protobuf module asks for a newer protobuf than NeMo does
        from transformers.utils import sentencepiece_model_pb2_new as sentencepiece_model_pb2

        self.path = path
        model = sentencepiece_model_pb2.ModelProto()
        try:
            model.ParseFromString(path.read_bytes())
            rewrites = bool(model.normalizer_spec.precompiled_charsmap)
            model.normalizer_spec.add_dummy_prefix = False
            model.normalizer_spec.remove_extra_whitespaces = False
            self._pieces = SentencePieceProcessor(model_proto=model.SerializeToString())
        except Exception as error:
            raise UserError(f"{path} is not a SentencePiece model: {error}") from None
        if rewrites:
            raise UserError(
                f"{path} rewrites text before it encodes it (normalisation {model.normalizer_spec.name}): "
                "a response could not be recovered from its ids"
            )
        try:
            self.chat_template = (path.parent / TEMPLATE_NAME).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} needs a chat template beside it, {path.parent / TEMPLATE_NAME}: {error}") from None
        ids = range(self._pieces.vocab_size())
        self._control = {self._pieces.id_to_piece(i): i for i in ids if self._pieces.is_control(i)}
        self._control_text = re.compile(
            "(" + "|".join(re.escape(text) for text in sorted(self._control, key=len, reverse=True)) + ")"
        )
        self.added_tokens_decoder = {
            i: SimpleNamespace(content=text, special=True, lstrip=False, rstrip=False)
            for text, i in self._control.items()
        }
        self.special_tokens_map = {
            name: self._pieces.id_to_piece(i)
            for name, i in (("bos_token", self._pieces.bos_id()), ("eos_token", self._pieces.eos_id()))
            if i >= 0
        }
        # the file also holds training settings (paths, thread counts), which do not affect ids
        self.sha256 = sha256_of_json(
            [[p.piece, p.score, int(p.type)] for p in model.pieces]
            + [
                model.trainer_spec.model_type,
                model.normalizer_spec.escape_whitespaces,
                model.trainer_spec.treat_whitespace_as_suffix,
            ]
        )

    def __len__(self) -> int:
        return self._pieces.vocab_size()

    def get_chat_template(self) -> str:
        """Text of the chat template."""
        return self.chat_template

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Vocabulary entries of ids."""
        return self._pieces.id_to_piece(ids)

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of a text; ``special`` says whether control tokens are recognised in it.

        Raises:
            UserError: the vocabulary cannot encode the text.
        """
        ids: list[int] = []
        for part in self._control_text.split(text) if special else [text]:
            if special and part in self._control:
                ids.append(self._control[part])
            elif part:
                ids += self._pieces.encode(part)
        if self._pieces.unk_id() in ids:
            raise UserError(f"{self.path} has no tokens for {text[:40]!r}")
        return ids

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text without control tokens, and the span of characters (start, end) of each; bytes share it."""
        ids = self.encode(text, special=False)
        spans, position, bytes_seen = [], 0, 0
        for i in ids:
            if self._pieces.is_byte(i):
                spans.append((position, position + 1))
                bytes_seen += 1
                if bytes_seen == len(text[position].encode()):
                    position, bytes_seen = position + 1, 0
            else:
                spans.append((position, position + len(self._pieces.id_to_piece(i))))
                position = spans[-1][1]
        return ids, spans

    def decode(self, ids: list[int], **_: Any) -> str:
        """Text of ids, control tokens included."""
        controls = set(self._control.values())
        return "".join(
            "".join(self._pieces.id_to_piece(list(run))) if control else self._pieces.decode(list(run))
            for control, run in groupby(map(int, ids), key=lambda i: i in controls)
        )
