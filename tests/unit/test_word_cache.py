"""Text split at known boundaries has the ids and spans of the unsplit text, for every supported kind of tokenizer."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import CHATML, CORPUS, SPECIAL_TOKENS
from treg_megatron.tokenizer import word_cache as word_memory
from treg_megatron.tokenizer.chat import load_tokenizer
from treg_megatron.tokenizer.conversation import Message

pytestmark = pytest.mark.slow

LLAMA_3, QWEN = sorted(word_memory._EXPRESSIONS, key=len, reverse=True)


def split(expression):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


KINDS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "llama3": split(LLAMA_3),
    "qwen": split(QWEN),
}

# Edge cases of the expressions: all kinds of spaces, marks, contractions, parts of special tokens.
edges = st.sampled_from(
    [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u2028",
        "\x1c",
        "\x85",
        "a",
        "It",
        "the",
        "x9",
        "12",
        "3",
        "'s",
        "'LL",
        "'",
        ",",
        ".",
        "(",
        "_",
        "<",
        "|",
        ">",
        "<|im_end|>",
        "im_end",
        "\u0301",
        "\u0338",
        "=",
        "\u00e9",
        "\u212a",
        "\u4e2d",
        "\U0001f469\u200d\U0001f680",
        "\u037e",
        "\u0661",
    ]
)
texts = st.lists(edges | st.characters(codec="utf-8"), min_size=1, max_size=30).map("".join).filter(str.strip)


def tokenizer_with(folder, pre_tokenizer, special=SPECIAL_TOKENS["chatml"]):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if "qwen" in str(folder):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.train_from_iterator(
        [*CORPUS, "a.\n\n(x) it's, 12, 345 = x9; the\u00e9 \n\n"] * 4,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(str(folder))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """For each kind, the tokenizer with its cache and the same one without."""
    made = {}
    for kind, pre_tokenizer in KINDS.items():
        with_memory = tokenizer_with(tmp_path_factory.mktemp(kind), pre_tokenizer)
        without = load_tokenizer(with_memory.folder)
        assert with_memory._engine._memories is not None
        without._engine._memories = None
        made[kind] = with_memory, without
    return made


@pytest.mark.parametrize("kind", KINDS)
@given(question=texts, response=texts)
@example(question="It's 12,\n\n  'll (x) ", response="a <|im_end|>, x\u0338 3")
def test_parts_have_the_ids_and_spans_of_the_whole(both, kind, question, response):
    with_memory, without = both[kind]
    messages = (Message("user", question),)
    assert with_memory.encode_prompt(messages) == without.encode_prompt(messages)
    ids, spans = with_memory.encode_response_with_spans(messages, response)
    expected_ids, expected_spans = without.encode_response_with_spans(messages, response)
    assert ids == expected_ids
    np.testing.assert_array_equal(spans, expected_spans)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_divided_between_words_and_before_punctuation(both, kind):
    parts = word_memory.known_cuts(both[kind][0]._engine._backend).parts.findall("It's so, (x) <|im_end|>\n\nthe end.")
    assert parts == ["It's", " so", ",", " (x", ")", " <|im_end|>\n\nthe", " end", "."]


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@pytest.mark.parametrize("kind", KINDS)
@given(
    words=st.lists(st.text(LETTERS, min_size=1, max_size=60), min_size=1, max_size=9), before=st.sampled_from(["", " "])
)
def test_words_of_letters_take_the_model_alone(both, kind, words, before):
    engine, text = both[kind][0]._engine, before + " ".join(words)
    assert word_memory.known_cuts(engine._backend).word_model is not None
    assert engine.encode(text, False) == engine.encode_whole(text, False).ids


def test_a_letter_that_the_vocabulary_lacks():
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "\u0120": 1, "<unk>": 2}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = KINDS["gpt2"]
    memory = word_memory.TokenCache(
        lambda text: tokenizer.encode(text, add_special_tokens=False), word_memory.known_cuts(tokenizer)
    )
    for text in ("aza a", "zaz", "z z a"):
        ids, spans = memory.encode_with_spans(text)
        assert ids == tokenizer.encode(text).ids and spans.tolist() == list(map(list, tokenizer.encode(text).offsets))


@pytest.mark.parametrize(
    "model, added",
    [
        (models.WordLevel({"a": 0}, "a"), []),
        (models.BPE(vocab={"a": 0, "b</w>": 1}, merges=[], end_of_word_suffix="</w>"), []),
        (models.BPE(), ["word"]),
    ],
)
def test_words_that_more_than_the_model_decides_about(model, added):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = KINDS["gpt2"]
    tokenizer.add_tokens(added)
    assert word_memory.known_cuts(tokenizer).word_model is None


def test_cache_is_bounded(both, monkeypatch):
    monkeypatch.setattr(word_memory, "_MOST", 10)
    engine = both["gpt2"][0]._engine
    words = [f"w{i}" for i in range(25)]
    assert engine.encode(" ".join(words), False) == engine.encode_whole(" ".join(words), False).ids
    engine.encode("long" * 100, False)
    known = engine._memories[False]._known
    assert len(known) <= 10 and not any("long" in part for part in known)


@pytest.mark.parametrize(
    "pre_tokenizer, added",
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=True), []),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), []),
        (pre_tokenizers.Metaspace(), []),
        (split(r"\S+|\s+"), []),
        (KINDS["gpt2"], [AddedToken("<|im_end|>", rstrip=True)]),
        (KINDS["gpt2"], [AddedToken("two words")]),
        (KINDS["gpt2"], [AddedToken("word", single_word=True)]),
    ],
)
def test_tokenizers_without_known_boundaries_have_no_cache(pre_tokenizer, added):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_tokens(added)
    assert word_memory.known_cuts(tokenizer) is None
