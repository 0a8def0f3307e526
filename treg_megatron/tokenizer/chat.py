"""Chat tokenizer: conversations to token ids, with the exact boundary between prompt and response.

Text is tokenized once; all later steps use ids, so the boundary cannot move. A training sequence is the prompt's ids
followed by the response's. The prompt is what the model's chat template renders up to the start of the assistant's
text; the response is that text and one end-of-turn token. :mod:`treg_megatron.tokenizer.thoughts` says where the
boundary lies if a response brings thoughts.
"""

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from treg_megatron.errors import UserError
from treg_megatron.tokenizer.completeness import Completeness
from treg_megatron.tokenizer.conversation import Message, Sampled
from treg_megatron.tokenizer.fast_tokenizer import FastEngine, tokenizer_hash
from treg_megatron.tokenizer.model_folder import existing_folder, require_embeddings
from treg_megatron.tokenizer.sentencepiece_model import SentencePieceTokenizer
from treg_megatron.tokenizer.special_tokens import SpecialTokens, replaced, texts_in
from treg_megatron.tokenizer.template import PROBES, ChatTemplate, tools_from
from treg_megatron.tokenizer.template_files import DEFAULT, chosen_template
from treg_megatron.tokenizer.thoughts import BEGIN, END, Boundary, probe_boundary
from treg_megatron.utils.files import read_json
from treg_megatron.utils.imports import heavy_imports

_WORD = "response"
_REMEMBERED = 64


class _Response(NamedTuple):
    """A response before it is encoded: the template's text, the answer's own, and the end-of-turn id.

    ``shift`` is the place of the answer's first character in the given response; -1: a space before it.
    """

    by_template: str
    words: str
    shift: int
    end_of_turn: int


class ChatTokenizer:
    """A tokenizer together with its chat template. Made by :func:`load_tokenizer`.

    Attributes:
        folder: where the tokenizer was loaded from.
        sha256: hash of everything that determines the ids of a text: vocabulary, merges, normalisation,
            pre-tokenization and added tokens. Saving and loading, padding, truncation and automatic BOS/EOS do not
            change it.
        template_name: name of the chat template, where it is not the default one; otherwise empty.
        template_sha256: hash of the chat template's text.
        template_inputs: what the chat template takes from outside and gets a fixed value for, such as today's date;
            empty for most templates.
        vocab_size: number of ids, added tokens included.
    """

    def __init__(self, tokenizer: Any, folder: Path, template: str = "", template_name: str = ""):
        self.folder, self.template_name = folder, template_name
        self._tokenizer = tokenizer
        self._engine = tokenizer if isinstance(tokenizer, SentencePieceTokenizer) else FastEngine(tokenizer)
        self._special = SpecialTokens(tokenizer)
        self._special_ids = set(self._special.ids.values())
        self._puts_space_first = tokenizer.convert_ids_to_tokens(self._encode(_WORD))[0].startswith("\u2581")
        own_hash = isinstance(tokenizer, SentencePieceTokenizer)
        self.sha256 = tokenizer.sha256 if own_hash else tokenizer_hash(tokenizer)
        self._template = ChatTemplate(template or tokenizer.get_chat_template(), tokenizer.special_tokens_map, folder)
        self.template_sha256, self.template_inputs = self._template.sha256, self._template.inputs
        self.vocab_size = len(tokenizer)
        self._completeness = Completeness(self._template)
        self._boundary = probe_boundary(self._template)
        self._last_prompt: tuple[Any, str] = (None, "")
        self._ends_of_turn: dict[str, int] = {}

    @property
    def template(self) -> str:
        """Text of the chat template."""
        return self._template.text

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the ids of a conversation, for the record of a run: hashes, and inputs of the template."""
        inputs = {"template_inputs": self.template_inputs} if self.template_inputs else {}
        name = {"chat_template": self.template_name} if self.template_name else {}
        return {"sha256": self.sha256, "chat_template_sha256": self.template_sha256, **name, **inputs}

    def encode_prompt(self, messages: Sequence[Message], tools: str = "", answers: Sequence[str] = ()) -> list[int]:
        """Ids of a conversation that ends with a user or tool turn, up to the start of the assistant's text.

        Special tokens come only from the template, so BOS is never doubled, and text in the conversation that looks
        like a special token is encoded as ordinary text. If the template has no system role, the system message is
        prepended to the first user turn.

        Args:
            messages: the conversation.
            tools: JSON text of the list of tools that the model may call; empty if there are none.
            answers: the texts of all responses that will follow this prompt, where they are known: whether they bring
                thoughts decides where the prompt ends. Without them, it ends as for a model that is to answer.

        Raises:
            UserError: the template rejects the conversation (for instance roles that do not alternate), or does not
                render all of it.
        """
        disguise = self._disguise(messages, tools)
        return self._encode_rendered(self._prompt_text(messages, tools, disguise, answers), disguise)

    def _prompt_text(
        self, messages: Sequence[Message], tools: str, disguise: Mapping[str, str], answers: Sequence[str]
    ) -> str:
        prompt = self._rendered_prompt(messages, tools, disguise)
        boundary = self._boundary.at(prompt)
        return boundary.base(prompt) + boundary.lead(answers)

    def _encode_rendered(self, text: str, disguise: Mapping[str, str]) -> list[int]:
        """Ids of text that the template rendered from disguised contents."""
        if not disguise:
            return self._encode(text)
        ids: list[int] = []
        for i, part in enumerate(self._special.place.split(text)):
            if i % 2:
                ids.append(self._special.ids.get(part, self._special.ids.get(part.strip())))
            elif part:
                ids += self._encode_within(replaced(part, {hidden: shown for shown, hidden in disguise.items()}))
        return ids

    def encode_response(
        self, messages: Sequence[Message], response: str, tools: str = "", answers: Sequence[str] = ()
    ) -> list[int]:
        """Ids of ``response`` as the template renders it after ``messages``, and exactly one end-of-turn token.

        If the template strips the response, so do the ids. Text in the response that looks like a special token is
        encoded as ordinary text. Whatever the template puts after the end-of-turn token is left out. A response with
        thoughts is encoded as it stands, even if the template would drop or rewrite them.

        Args:
            messages: the conversation.
            response: the answer's text.
            tools: as for :meth:`encode_prompt`.
            answers: as for :meth:`encode_prompt`, and the same as there.

        Raises:
            UserError: the template rejects the conversation, rewrites the response, or does not end it with a special
                token; or the response does not continue the prompt, whose ``answers`` were others.
        """
        parts = self._split_response(messages, response, tools, answers)
        ids = self._encode(parts.words, special=False)
        if parts.by_template:
            ids = [*self._encode(parts.by_template), *ids]
        return [*ids, parts.end_of_turn]

    def encode_response_with_spans(
        self, messages: Sequence[Message], response: str, tools: str = "", answers: Sequence[str] = ()
    ) -> tuple[list[int], np.ndarray]:
        """:meth:`encode_response`, and the character span in ``response`` of each id except the end-of-turn token.

        Spans are int64 [tokens, 2]: start and end (exclusive). Tokens that are bytes of one character share it;
        characters that no token covers, such as a space, belong to the next token. The template's own tokens before
        the response have the span -1 to -1.
        """
        parts = self._split_response(messages, response, tools, answers)
        ids, spans = self._engine.encode_with_spans(parts.words)
        starts, ends = np.asarray(spans, dtype=np.int64).reshape(-1, 2).T
        reached = np.concatenate([[0], np.maximum.accumulate(ends)])[:-1]
        spans = np.maximum(np.column_stack([np.minimum(starts, reached), ends]) + parts.shift, 0)
        before = self._encode(parts.by_template)
        return [*before, *ids, parts.end_of_turn], np.concatenate([np.full((len(before), 2), -1), spans])

    def encode_pair(
        self, messages: Sequence[Message], answers: Sequence[str], tools: str = ""
    ) -> tuple[list[int], list[list[int]]]:
        """Ids of the prompt that several answers share, and of each answer.

        Raises:
            UserError: as for :meth:`encode_prompt` and :meth:`encode_response`.
        """
        prompt = self.encode_prompt(messages, tools, answers)
        return prompt, [self.encode_response(messages, answer, tools, answers) for answer in answers]

    def encode_turns(
        self, messages: Sequence[Message], turns: Sequence[Message], tools: str = "", answers: Sequence[str] = ()
    ) -> tuple[list[int], np.ndarray]:
        """Ids of an answer of several turns after the prompt of ``messages``, and which of them the assistant writes.

        The answer is one suffix, from the first assistant turn to the end of the last one, with the turns of users and
        tools between them, all as the template renders the whole conversation.

        Args:
            messages: the conversation.
            turns: the answer's turns, of which the first and the last are the assistant's.
            tools: as for :meth:`encode_prompt`.
            answers: as for :meth:`encode_prompt`, and the same as there: a
                :class:`~treg_megatron.tokenizer.conversation.FirstTurn` for an answer of several turns.

        Returns:
            ids, a list of n; written, [n] bool, True for the assistant's text and the tokens that end its turns.

        Raises:
            UserError: as for :meth:`encode_prompt` and :meth:`encode_response`; or the template renders a turn
                differently once others follow, so that no ids hold for both.
        """
        try:
            return self._encode_where_they_stand(messages, turns, tools, answers)
        except UserError:
            if not any(turn.extra for turn in turns if turn.role == "assistant"):
                raise
        return self._encode_turn_by_turn(messages, turns, tools, answers)

    def _encode_where_they_stand(
        self, messages: Sequence[Message], turns: Sequence[Message], tools: str, answers: Sequence[str]
    ) -> tuple[list[int], np.ndarray]:
        conversation = [*messages, *turns]
        disguise = self._disguise(conversation, tools)
        prompt = self._rendered_prompt(messages, tools, disguise)
        boundary = self._boundary.at(prompt)
        base = boundary.base(prompt)
        lead = boundary.lead(answers)
        whole = self._template.render(conversation, False, tools, disguise)
        if not whole.startswith(base + lead):
            raise self._differs_once_others_follow()
        self._completeness.require(conversation, tools, disguise, whole)
        ids: list[int] = []
        written: list[bool] = []
        place, end_of_last = len(base + lead), ""
        for i, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            start, end, words = self._place_of(conversation, len(messages) + i, tools, disguise, whole)
            before = self._rendered_prompt(conversation[: len(messages) + i], tools, disguise)
            own_spaces = _trailing_spaces(whole[:start]) - _trailing_spaces(before) if not boundary.plain else 0
            start -= max(own_spaces, 0)
            between = self._encode_rendered(end_of_last + whole[place:start], disguise)
            between = between[self._end_of_special(between, 1) :] if end_of_last else between
            ids += between
            written += [not i] * len(between)  # before the first turn stands what an answer without others has, too
            special = self._special.place.match(whole, end)
            if special is None:
                raise self._differs_once_others_follow()
            if turn.extra:
                answer = self._encode_rendered(whole[start:end], disguise)
            else:
                space = "" if self._puts_space_first else whole[start:][: max(own_spaces, 0)]
                answer = self._encode(space + words, special=False)
            answer = [*answer, self._first_special(special[0])]
            ids += answer
            written += [True] * len(answer)
            place, end_of_last = special.end(), special[0]
        return ids, np.array(written, dtype=bool)

    def _place_of(
        self, conversation: Sequence[Message], i: int, tools: str, disguise: Mapping[str, str], whole: str
    ) -> tuple[int, int, str]:
        """Where turn ``i`` begins and ends in the whole, where other words stand if it says nothing else; its words."""
        places = []
        for _, word, _ in PROBES:
            others = [*conversation[:i], Message("assistant", word), *conversation[i + 1 :]]
            before, found, after = self._template.render(others, False, tools, disguise).partition(word)
            places.append((len(before), len(whole) - len(after)))
            if not (found and whole.startswith(before) and whole.endswith(after)):
                raise self._differs_once_others_follow()
        if places[0] != places[1] or places[0][0] > places[0][1]:
            raise self._differs_once_others_follow()
        start, end = places[0]
        words = replaced(whole[start:end], {hidden: shown for shown, hidden in disguise.items()})
        if not _shows(words, conversation[i]):
            raise self._differs_once_others_follow()
        return start, end, words

    def _differs_once_others_follow(self) -> UserError:
        return UserError(
            f"the chat template of {self.folder} renders an assistant turn differently once others follow: "
            "an answer that others follow has no exact ids"
        )

    def encode_further(
        self,
        messages: Sequence[Message],
        answer: Sequence[Message],
        further: Sequence[Message],
        tools: str = "",
        answers: Sequence[str] = (),
    ) -> list[int]:
        """Ids of the turns behind an answer, from the token that ends it up to the start of the assistant's next text.

        Behind the ids of prompt and answer, but for that token, they make a prompt in which these are as they are
        without further turns.

        Args:
            messages: the conversation.
            answer: its answer's turns, of which the first and the last are the assistant's.
            further: the turns behind it, of which the last is a user's.
            tools: as for :meth:`encode_prompt`.
            answers: as for :meth:`encode_prompt`, of the first prompt; the assistant's next text is one of them, too.

        Raises:
            UserError: the template rejects the further turns, or renders the answer differently before them.
        """
        answered = [*messages, *answer]
        conversation = [*answered, *further]
        disguise = self._disguise(conversation, tools)
        first, prompt = (self._prompt_text(turns, tools, disguise, answers) for turns in (messages, conversation))
        whole = self._template.render(conversation, False, tools, disguise)
        end = 0
        for i, turn in enumerate(answer, start=len(messages)):
            if turn.role == "assistant":
                _, end, _ = self._place_of(conversation, i, tools, disguise, whole)
        special = self._special.place.match(whole, end)
        if special is None:
            raise self._differs_once_others_follow()
        same = whole[: special.end()]
        alone = self._template.render(answered, False, tools, disguise)
        if not (same.startswith(first) and alone.startswith(same) and prompt.startswith(same)):
            raise self._differs_once_others_follow()
        return self._encode_rendered(special[0] + prompt[len(same) :], disguise)

    def _encode_turn_by_turn(
        self, messages: Sequence[Message], turns: Sequence[Message], tools: str, answers: Sequence[str]
    ) -> tuple[list[int], np.ndarray]:
        """Ids of an answer that calls tools: each turn as if it were the last, where all agree on those before."""
        prompt = self.encode_prompt(messages, tools, answers)
        if prompt != self.encode_prompt(messages, tools):
            raise self._differs_once_others_follow()
        ids: list[int] = []
        written: list[bool] = []
        for i, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = [*messages, *turns[:i]]
            if i:
                so_far, whole = [*prompt, *ids], self.encode_prompt(before, tools)
                between = whole[self._end_of_special(whole, sum(token in self._special_ids for token in so_far)) :]
                if self.decode(whole[: len(whole) - len(between)]) != self.decode(so_far):
                    raise self._differs_once_others_follow()
                ids += between
                written += [False] * len(between)
            answer = self._encode_call(before, turn, tools) if turn.extra else None
            answer = answer or self.encode_response(before, turn.content, tools)
            ids += answer
            written += [True] * len(answer)
        return ids, np.array(written, dtype=bool)

    def _encode_call(self, messages: Sequence[Message], turn: Message, tools: str) -> list[int]:
        """Ids of an assistant turn that calls tools, as the template renders it, up to the token that ends it."""
        disguise = self._disguise([*messages, turn], tools)
        prompt = self._prompt_text(messages, tools, disguise, ())
        whole = self._template.render([*messages, turn], False, tools, disguise)
        self._completeness.require([*messages, turn], tools, disguise, whole)
        if not whole.startswith(prompt):
            raise UserError(
                f"the chat template of {self.folder} renders a prompt differently once a call of a tool follows: "
                "no exact boundary between them exists"
            )
        ids = self._encode_rendered(whole[len(prompt) :], disguise)
        ends = [place for place, token in enumerate(ids) if token in self._special_ids]
        if not ends:
            raise UserError(f"the chat template of {self.folder} does not end a call of a tool with a special token")
        return ids[: ends[-1] + 1]

    def _end_of_special(self, ids: Sequence[int], number: int) -> int:
        """Where special token ``number``, counted from 1, ends."""
        for place, token in enumerate(ids):
            number -= token in self._special_ids
            if not number:
                return place + 1
        return len(ids)

    def spelled_specials(self, text: str) -> list[str]:
        """Special tokens that are spelled out in a text, each once: a sign that a template has been applied already."""
        return self._special.spelled(text)

    def looks_templated(self, text: str) -> bool:
        """Whether a text begins like a conversation in this template, or ends like one of its turns."""
        heads, ends = self._turn_edges
        return text.lstrip().startswith(heads) or text.rstrip().endswith(ends)

    @functools.cached_property
    def _turn_edges(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        question = PROBES[0][0]
        head = self._template.render([Message("user", question)], True).partition(question)[0].strip()
        special = tuple(self._special.ids)
        heads = {head, self._special.place.sub("", head, count=1).strip()}
        return (*special, *(words for words in heads if len(words) > 2)), special

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @property
    def end_of_turn(self) -> int:
        """The token that ends a response.

        Raises:
            UserError: the template does not end a response with a special token.
        """
        return self._first_special(self._boundary.end)

    def special_id(self, text: str) -> int:
        """The id of a special token.

        Raises:
            UserError: the tokenizer has no such special token.
        """
        if text not in self._special.ids:
            raise UserError(f"{text!r} is not a special token of the tokenizer of {self.folder}")
        return self._special.ids[text]

    def sampled(self, ids: Sequence[int], stop_tokens: Sequence[int] = ()) -> Sampled:
        """A response from generated ids, which may have padding after the token that ended it.

        Args:
            ids: the generated ids.
            stop_tokens: what ends a response besides the end-of-turn token.
        """
        ids = list(ids)
        end = next((i for i, token in enumerate(ids) if token == self.end_of_turn or token in stop_tokens), None)
        finished = end is not None
        ids = ids if end is None else ids[: end + 1]
        words = ids[:-1] if finished else ids
        text = self._tokenizer.decode(words, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Sampled(text, ids, finished)

    def _split_response(
        self, messages: Sequence[Message], response: str, tools: str, answers: Sequence[str]
    ) -> _Response:
        disguise = self._disguise(messages, tools, response)
        prompt = self._rendered_prompt(messages, tools, disguise)
        boundary = self._boundary.at(prompt)
        base, lead = boundary.base(prompt), boundary.lead(answers)
        rest = self._rest(messages, response, tools, disguise, base)
        found = self._as_rendered(response, rest, disguise, boundary)
        if found is None and boundary.brings_thoughts(response):
            before, _ = boundary.parts(response)
            end = rest.removeprefix(before + replaced(response, disguise))
            if end == rest:  # dropped or rewritten; what ends the turn is seen behind another answer
                word = PROBES[0][1]
                end = self._rest(messages, word, tools, disguise, base).partition(word)[2]
            found = self._with_thoughts(before, response, end)
        if found is None:
            raise UserError(f"the chat template of {self.folder} rewrites the response {_shortened(response)!r}")
        whole = found.by_template + found.words
        if not whole.startswith(lead):
            raise UserError(
                f"the response {_shortened(response)!r} does not continue its prompt, which ends in {lead!r}: "
                "prompt and responses must be encoded together"
            )
        if len(lead) <= len(found.by_template):
            return found._replace(by_template=found.by_template[len(lead) :])
        within = len(lead) - len(found.by_template)
        return found._replace(by_template="", words=found.words[within:], shift=found.shift + within)

    def _rest(
        self, messages: Sequence[Message], response: str, tools: str, disguise: Mapping[str, str], base: str
    ) -> str:
        whole = self._template.render([*messages, Message("assistant", response)], False, tools, disguise)
        if not whole.startswith(base):
            raise UserError(
                f"the chat template of {self.folder} renders a prompt differently once a response follows: "
                "no exact boundary between them exists"
            )
        return whole[len(base) :]

    def _as_rendered(self, response: str, rest: str, disguise: Mapping[str, str], at: Boundary) -> _Response | None:
        """The response behind the block, stripped as the template strips it; None if it is not there."""
        if not rest.startswith(at.block):
            return None
        rest = rest[len(at.block) :]
        for words in _strippings(response):
            space = " " * (_leading_spaces(rest) - _leading_spaces(words))
            rendered = space + replaced(words, disguise)
            if rest.startswith(rendered):
                end_of_turn = self._first_special(rest[len(rendered) :])
                cut = len(response) - len(response.lstrip()) if len(words) < len(response.rstrip()) else 0
                before, _ = at.parts(response)
                if self._puts_space_first:
                    return _Response(before, words, cut, end_of_turn)
                return _Response(before, space + words, cut - len(space), end_of_turn)
        return None

    def _with_thoughts(self, before: str, response: str, end: str) -> _Response:
        """The response with its thoughts as it stands."""
        if special := self._special.ids.keys() & {BEGIN, END}:
            raise UserError(
                f"{min(special)} is a special token of {self.folder}, which the text of a response cannot hold"
            )
        return _Response(before, response, 0, self._first_special(end))

    def _rendered_prompt(self, messages: Sequence[Message], tools: str, disguise: Mapping[str, str]) -> str:
        key = (tuple(messages), tools, tuple(disguise.items()))
        if self._last_prompt[0] != key:  # requested again for each response
            text = self._template.render(messages, True, tools, disguise)
            self._completeness.require(messages, tools, disguise, text)
            self._last_prompt = key, text
        return self._last_prompt[1]

    def _disguise(self, messages: Sequence[Message], tools: str, *others: str) -> dict[str, str]:
        return self._special.disguise([*_texts(messages, tools), *others])

    def _first_special(self, text: str) -> int:
        if text not in self._ends_of_turn:
            if len(self._ends_of_turn) > _REMEMBERED:
                self._ends_of_turn.clear()
            self._ends_of_turn[text] = self._find_first_special(text)
        return self._ends_of_turn[text]

    def _find_first_special(self, text: str) -> int:
        for token in self._encode(text):
            if token in self._special_ids:
                return token
        raise UserError(f"the chat template of {self.folder} does not end a response with a special token")

    def _encode(self, text: str, special: bool = True) -> list[int]:
        return self._engine.encode(text, special)

    def _encode_within(self, text: str) -> list[int]:
        """Ids of a text between special tokens, none of it recognised as one."""
        if not self._puts_space_first:
            return self._encode(text, special=False)
        # The tokenizer prepends a space to what it takes for the start of a text. A line break is a separate token, so
        # what follows one is encoded as in mid-text.
        before, ids = self._encode("\n", special=False), self._encode("\n" + text, special=False)
        return ids[len(before) :] if ids[: len(before)] == before else self._encode(text, special=False)


def load_tokenizer(folder: str | Path, template: str = "") -> ChatTokenizer:
    """Load a tokenizer and its chat template from this machine; nothing is downloaded or executed.

    Args:
        folder: a Hugging Face folder with a fast tokenizer; or a SentencePiece ``.model`` file, or a folder with
            ``tokenizer.model`` and no Hugging Face tokenizer, with ``chat_template.jinja`` in the same folder.
        template: name of the chat template, for a tokenizer with several; empty: the one named ``default``.

    Raises:
        UserError: the folder is missing, has no such tokenizer or no such chat template, or its config.json is of a
            model with fewer embeddings than the tokenizer has ids.
    """
    folder = Path(folder).expanduser()
    folder = folder if folder.is_file() else existing_folder(folder, "tokenizer folder")
    tokenizer = _loaded(folder)
    chosen = chosen_template(tokenizer.chat_template, folder, template)
    loaded = ChatTokenizer(tokenizer, folder, chosen, "" if template == DEFAULT else template)
    beside = folder / "config.json"
    vocabulary = read_json(beside).get("vocab_size") if beside.is_file() else None
    if isinstance(vocabulary, int):
        require_embeddings(loaded.vocab_size, vocabulary, folder)
    return loaded


def _loaded(folder: Path) -> Any:
    if folder.is_file():
        return SentencePieceTokenizer(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        if (folder / "tokenizer.model").is_file():
            return SentencePieceTokenizer(folder / "tokenizer.model")
        raise UserError(f"{folder} holds no tokenizer (tokenizer.json, tokenizer_config.json or tokenizer.model)")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # we encode one text at a time
    with heavy_imports():
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"the tokenizer of {folder} cannot be loaded: {error}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{folder} holds a slow tokenizer; save it as a fast one (tokenizer.json) first")
    return tokenizer


def _texts(messages: Sequence[Message], tools: str) -> Iterator[str]:
    for message in messages:
        yield message.content
        if message.extra:
            yield from texts_in(json.loads(message.extra))
    if tools:
        yield from texts_in(tools_from(tools))


def _leading_spaces(text: str) -> int:
    return len(text) - len(text.lstrip(" "))


def _shows(words: str, turn: Message) -> bool:
    """Whether what a template renders in the place of a turn is its text; calls of tools may stand beside it."""
    return turn.content in words if turn.extra else words in _strippings(turn.content)


def _strippings(text: str) -> tuple[str, ...]:
    """A text as templates may render it: whole, or without white space at its ends."""
    return text, text.rstrip(), text.lstrip(), text.strip()


def _trailing_spaces(text: str) -> int:
    return len(text) - len(text.rstrip(" "))


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
