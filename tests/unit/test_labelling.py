"""The step `label`: formula, alignment, dropped pairs, and unchanged results after an interruption."""

import dataclasses
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.support.file_operations import contents
from treg_megatron.config.schema import IndexSection, LabelSection
from treg_megatron.data.labelled_pairs import labelled_files, labelling_run, read_labelled, read_shard_metadata
from treg_megatron.data.pairs import IDENTICAL_RESPONSES, REPEATED_PAIR
from treg_megatron.data.streams import open_streams
from treg_megatron.errors import UserError
from treg_megatron.labelling import job as labelling
from treg_megatron.labelling.contrastive import contrastive_rewards
from treg_megatron.labelling.indexing import index
from treg_megatron.labelling.job import label
from treg_megatron.labelling.prompt_pair import FOLDER, load_prompt_pair
from treg_megatron.labelling.scoring import ScoredSequence
from treg_megatron.tokenizer.conversation import Message

pytestmark = pytest.mark.slow

TOOLS = Path(__file__).resolve().parents[2] / "tools"
ROWS = [
    {
        "pair_id": f"pair {i}",
        "prompt": f"Question {i}?",
        "chosen": "It is so." + " Indeed." * i,
        "rejected": "It is not.",
    }
    for i in range(7)
]


class ArithmeticScorer:
    """Scorer whose log-probs depend on prompt, position and token in a known way."""

    max_length, vocab_size = 1024, 384

    def __init__(self, fail_after: int | None = None):
        self.calls, self.fail_after = 0, fail_after

    def score(self, sequences, scored=lambda sequences, tokens: None):
        if self.calls == self.fail_after:
            raise KeyboardInterrupt
        self.calls += 1
        scored(len(sequences), sum(sequence.length for sequence in sequences))
        return [self.logps(sequence) for sequence in sequences]

    @staticmethod
    def logps(sequence):
        ids = np.array([*sequence.prompt_ids, *sequence.response_ids], dtype=np.float64)
        before = np.cumsum(ids)[len(sequence.prompt_ids) - 1 : -1]
        return -(np.modf((before + 1) * (ids[len(sequence.prompt_ids) :] + 1) * 0.618)[0] * 5).astype(np.float32)


@pytest.fixture
def section(tiny_folder, tmp_path):
    return LabelSection(
        model=str(tiny_folder),
        template=None,
        pairs=str(jsonl(tmp_path / "pairs.jsonl", ROWS)),
        format="auto",
        columns={},
        ignore=[],
        output=str(tmp_path / "labelled"),
        source="contrastive_prompts",
        prompt_pair="few_shot",
        better_model=None,
        worse_model=None,
        ratio_scale=1.0,
        squash="auto",
        values={},
        max_length=512,
        max_revision_length=None,
        engine="huggingface",
        checkpoint="",
        better_checkpoint=None,
        worse_checkpoint=None,
        tensor=1,
        pipeline=1,
        batch_tokens=2048,
        dtype="float32",
        device="cpu",
        reward_eot=True,
        shard_pairs=3,
    )


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_formula_against_float64_and_exactly_odd():
    random = np.random.default_rng(0)
    better, worse = (-random.exponential(3, 1000).astype(np.float32) for _ in range(2))
    exact = 1 / (1 + np.exp(worse.astype(np.float64) - better.astype(np.float64))) - 0.5
    rewards = contrastive_rewards(better, worse)
    assert rewards.dtype == np.float32
    np.testing.assert_allclose(rewards, exact, atol=1e-7)
    np.testing.assert_array_equal(contrastive_rewards(worse, better), -rewards)
    assert np.abs(contrastive_rewards(np.float32([0, -200]), np.float32([-200, 0]))).max() <= 0.5


def test_values_belong_to_the_response_tokens(section, chatml):
    manifest = label(section, ArithmeticScorer())
    prompts = load_prompt_pair("few_shot")
    pairs = list(read_labelled(section.output))
    assert [pair.pair_id for pair in pairs] == [row["pair_id"] for row in ROWS]
    assert manifest["pairs"] == 7 and [shard["pairs"] for shard in manifest["shards"]] == [3, 3, 1]
    for pair, row in zip(pairs, ROWS):
        messages = (Message("user", row["prompt"]),)
        assert (pair.prompt, pair.chosen) == (f"User: {row['prompt']}", row["chosen"])
        for side in ("chosen", "rejected"):
            response_ids = chatml.encode_response(messages, row[side])
            tokens = getattr(pair, f"{side}_tokens")
            assert tokens.tolist() == chatml.encode_prompt(messages) + response_ids

            def logps(prompt_ids, response_ids=response_ids):
                return ArithmeticScorer.logps(ScoredSequence(prompt_ids, response_ids)).astype(np.float64)

            better, worse = (
                logps(chatml.encode_prompt(side_of(messages, row[side]))) for side_of in (prompts.better, prompts.worse)
            )
            np.testing.assert_allclose(
                getattr(pair, f"{side}_token_rewards"), 1 / (1 + np.exp(worse - better)) - 0.5, atol=1e-6
            )
            np.testing.assert_allclose(getattr(pair, f"{side}_ref_logprobs"), logps(chatml.encode_prompt(messages)))


@pytest.mark.parametrize("name", ["answer", "few_shot", "revise", "revise_turn"])
def test_swapped_prompts_give_exactly_the_negative(section, tmp_path, name):
    pair = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    pair["fill"] = {"better": pair["fill"]["worse"], "worse": pair["fill"]["better"]}
    (tmp_path / "swapped.yaml").write_text(yaml.safe_dump(pair))
    swapped = dataclasses.replace(section, prompt_pair=str(tmp_path / "swapped.yaml"), output=str(tmp_path / "swapped"))
    section.prompt_pair = name
    for one in (section, swapped):
        label(one)  # with the tiny model
    sizes = []
    for straight, turned in zip(read_labelled(section.output), read_labelled(swapped.output), strict=True):
        for column in ("chosen_token_rewards", "rejected_token_rewards"):
            np.testing.assert_array_equal(getattr(straight, column), -getattr(turned, column))
            sizes.append(np.abs(getattr(straight, column)).mean())
        np.testing.assert_array_equal(straight.chosen_ref_logprobs, turned.chosen_ref_logprobs)
    assert min(sizes) > 0


def test_the_end_of_turn_token_can_go_unrewarded(section, tmp_path):
    label(section, ArithmeticScorer())
    without = dataclasses.replace(section, reward_eot=False, output=str(tmp_path / "without"))
    label(without, ArithmeticScorer())
    for a, b in zip(read_labelled(section.output), read_labelled(without.output), strict=True):
        assert b.chosen_token_rewards[-1] == b.rejected_token_rewards[-1] == 0 != a.chosen_token_rewards[-1]
        np.testing.assert_array_equal(a.chosen_token_rewards[:-1], b.chosen_token_rewards[:-1])


def test_what_does_not_fit_is_dropped_whole_and_counted(section, chatml, tmp_path):
    def rendered(prompt, response=""):
        return len(chatml.encode_prompt((Message("user", prompt),))) + (
            len(chatml.encode_response((Message("user", prompt),), response)) if response else 0
        )

    section.prompt_pair, section.max_length, section.max_revision_length = "revise", 400, 500
    fitting = {"prompt": "Q?", "chosen": "yes", "rejected": "no"}
    rows = [
        fitting,
        {**fitting, "prompt": "x" * 400},
        {**fitting, "chosen": "z" * 390},
        {**fitting, "chosen": "z" * 300},
        {**fitting, "chosen": "no"},
        fitting,
    ]
    assert rendered("Q?", "z" * 300) < 400 < rendered("Q?", "z" * 390)
    section.pairs = str(jsonl(tmp_path / "some.jsonl", rows))
    manifest = label(section, ArithmeticScorer())
    reasons = (
        labelling.PROMPT_FILLS_CONTEXT,
        labelling.TOO_LONG,
        labelling.REVISION_TOO_LONG,
        IDENTICAL_RESPONSES,
        REPEATED_PAIR,
    )
    assert manifest["drops"] == {reason: 1 for reason in reasons}
    assert manifest["pairs"] == 1
    (pair,) = read_labelled(section.output)
    assert len(pair.chosen_tokens) == rendered("Q?", "yes")


def test_a_template_that_cannot_render_is_told_with_the_pair(section, tiny_folder, tokenizer_folders, tmp_path):
    """Two user turns in a row, which Gemma's template refuses; and a template that is broken altogether."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    for path in tokenizer_folders["turns"].iterdir():
        shutil.copy(path, folder)
    twice = [{"role": "user", "content": "Q?"}, {"role": "user", "content": "Well?"}]
    section.model, section.pairs = (
        str(folder),
        str(
            jsonl(
                tmp_path / "turns.jsonl",
                [
                    {"pair_id": "fits", "prompt": "Q?", "chosen": "yes", "rejected": "no"},
                    {"pair_id": "twice", "prompt": twice, "chosen": "yes", "rejected": "no"},
                ],
            )
        ),
    )
    with pytest.raises(UserError, match="turns.jsonl row 2, pair twice: the chat template of .* rejects"):
        label(dataclasses.replace(section, shard_pairs=1), scorer := ArithmeticScorer())
    assert scorer.calls == 0  # the row is in the second shard
    assert not Path(section.output).exists()
    (folder / "chat_template.jinja").write_text("{% for message in messages %}")
    with pytest.raises(UserError, match="the chat template of .* cannot be used"):
        label(section, ArithmeticScorer())


def test_sampled_ids_are_used_as_they_are(section, chatml, tmp_path):
    """Even where tokenising their text gives other ids, and where the model did not end its turn."""
    sampled = [chatml.encode_response((Message("user", "Q?"),), letter)[0] for letter in "It is"]
    row = {
        "prompt": "Q?",
        "chosen": "It is",
        "rejected": "no",
        "chosen_ids": sampled,
        "rejected_ids": chatml.encode_response((Message("user", "Q?"),), "no"),
        "tokenizer": chatml.sha256,
    }
    assert sampled != chatml.encode_response((Message("user", "Q?"),), "It is")
    section.pairs = str(jsonl(tmp_path / "sampled.jsonl", [row]))
    label(section, ArithmeticScorer())
    (pair,) = read_labelled(section.output)
    assert pair.chosen_tokens.tolist()[-len(sampled) :] == sampled
    assert len(pair.chosen_token_rewards) == len(sampled)
    section.output = str(tmp_path / "other")
    for change, message in (
        ({"tokenizer": "other"}, "sampled with another tokenizer"),
        ({"chosen_ids": [10**6]}, "chosen_ids holds 1000000"),
        ({"chosen_ids": None}, "go together"),
        ({"chosen_ids": ["a"]}, "a list of token ids"),
    ):
        section.pairs = str(jsonl(tmp_path / "sampled.jsonl", [row | change]))
        with pytest.raises(UserError, match=message):
            label(section, ArithmeticScorer())


def revised(qualities: str) -> str:
    """What follows an answer, up to the assistant's next text."""
    return (
        f"\n<|im_start|>user\nWrite only a revision of your last reply that is {qualities}.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("own", [False, True], ids=["built in", "own file"])
@pytest.mark.parametrize("answer", ["text", "sampled", "cut off", "several turns"])
def test_a_further_turn_continues_exactly_what_the_reference_reads(section, chatml, tmp_path, answer, own):
    ids = [*(chatml.encode_response((Message("user", "Q?"),), letter)[0] for letter in " It"), chatml.end_of_turn]
    asked = [{"role": "user", "content": "Q?"}]
    more = [{"role": "assistant", "content": "Which?"}, {"role": "user", "content": "Any."}]
    sampled = {"prompt": "Q?", "chosen": " It", "rejected": "no", "rejected_ids": [ids[1]], "tokenizer": chatml.sha256}
    row = {
        "text": {"prompt": "Q?", "chosen": " It \n<|im_end|>", "rejected": "no"},
        "sampled": sampled | {"chosen_ids": ids},
        "cut off": sampled | {"chosen_ids": ids[:-1]},
        "several turns": {
            "chosen": [*asked, *more, {"role": "assistant", "content": "This."}],
            "rejected": [*asked, {"role": "assistant", "content": "No."}],
        },
    }[answer]
    section.pairs, section.prompt_pair = str(jsonl(tmp_path / "one.jsonl", [row])), "revise_turn"
    if own:
        (tmp_path / "mine.yaml").write_text((FOLDER / "revise_turn.yaml").read_text())
        section.prompt_pair = str(tmp_path / "mine.yaml")
    seen = []

    class Recording(ArithmeticScorer):
        def score(self, sequences, scored=lambda sequences, tokens: None):
            seen.extend(sequences)
            return super().score(sequences, scored)

    label(section, Recording())
    fill = load_prompt_pair("revise_turn").fill
    for reference, *others in (seen[:3], seen[3:]):
        read = [*reference.prompt_ids, *reference.response_ids]
        end = "" if read[-1] == chatml.end_of_turn else "<|im_end|>"
        for side, other in zip(("better", "worse"), others, strict=True):
            assert other.response_ids == reference.response_ids
            assert other.prompt_ids[: len(read)] == read
            assert chatml.decode(other.prompt_ids[len(read) :]) == end + revised(fill[side]["qualities"])
    if answer in ("sampled", "cut off"):
        assert seen[0].response_ids == row["chosen_ids"]


def test_a_template_that_allows_no_further_turn_names_the_prompt_pair_to_use(section, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    template = Path(__file__).parents[1] / "data" / "chat_templates" / "qwen3_like.jinja"
    shutil.copy(template, tmp_path / "model" / "chat_template.jinja")
    section.model, section.prompt_pair = str(tmp_path / "model"), "revise_turn"
    with pytest.raises(UserError) as error:
        label(section, ArithmeticScorer())
    assert "row 1, pair pair 0: the chat template of" in str(error.value) and "\n" not in str(error.value)
    assert "differently once others follow" in str(error.value)
    assert str(error.value).endswith("which this rules out: use prompt pair revise instead")
    assert not Path(section.output).exists()


def test_taking_a_row_out_keeps_the_shards_that_did_not_hold_it(section, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        label(section, ArithmeticScorer(fail_after=2))
    before = contents(section.output)
    assert len(before) == 2
    jsonl(Path(section.pairs), [row for number, row in enumerate(ROWS) if number != 4])
    scorer = ArithmeticScorer()
    assert label(section, scorer)["pairs"] == 6
    assert scorer.calls == 1  # only the second shard held the row; without it, two shards suffice
    after = contents(section.output)
    first = next(name for name in before if "00000" in str(name))
    assert after[first] == before[first]
    fresh = dataclasses.replace(section, output=str(tmp_path / "fresh"))
    label(fresh, ArithmeticScorer())
    kept, made = (list(read_labelled(folder)) for folder in (section.output, fresh.output))
    assert [pair.pair_id for pair in kept] == [pair.pair_id for pair in made]


def test_weights_of_pairs_are_kept_and_belong_to_their_shard(section):
    def weighted(**weights):
        jsonl(Path(section.pairs), [row | {"pair_weight": weights.get(row["pair_id"])} for row in ROWS])

    weighted(**{"pair 1": 0.5, "pair 5": 2})
    label(section, ArithmeticScorer())
    assert [pair.pair_weight for pair in read_labelled(section.output)] == [None, 0.5, None, None, None, 2.0, None]
    assert len(labelled_files(section.output)) == 3
    assert [b"pair_weight" in path.read_bytes() for path in labelled_files(section.output)] == [True, True, False]
    weighted(**{"pair 1": 0.5, "pair 5": 3})
    (Path(section.output) / "manifest.json").unlink()
    label(section, scorer := ArithmeticScorer())
    assert scorer.calls == 1 and list(read_labelled(section.output))[5].pair_weight == 3
    weighted(**dict.fromkeys((row["pair_id"] for row in ROWS), 0))
    with pytest.raises(UserError, match="pairs.jsonl: the pair_weight of every pair is 0"):
        label(dataclasses.replace(section, output=section.output + "2"), ArithmeticScorer())


def test_labels_of_other_pairs_are_not_taken_for_an_edited_file(section):
    with pytest.raises(KeyboardInterrupt):
        label(section, ArithmeticScorer(fail_after=1))
    before = contents(section.output)
    jsonl(Path(section.pairs), [row | {"prompt": f"other {number}"} for number, row in enumerate(ROWS)])
    with pytest.raises(UserError, match="is a run with another pairs; name another label.output"):
        label(section, ArithmeticScorer())
    assert contents(section.output) == before


def test_of_several_turns_only_what_the_assistant_writes_is_scored(section, chatml, tmp_path):
    """The response is one suffix; turns of others in it carry the mark of no score, and a log-prob of 0."""
    start = [{"role": "user", "content": "Q?"}]
    more = [{"role": "assistant", "content": "Which?"}, {"role": "user", "content": "Any."}]
    row = {
        "chosen": [*start, *more, {"role": "assistant", "content": "This."}],
        "rejected": [*start, {"role": "assistant", "content": "No."}],
    }
    section.pairs = str(jsonl(tmp_path / "turns.jsonl", [row]))
    for section.reward_eot in (True, False):
        section.output = str(tmp_path / f"labelled {section.reward_eot}")
        label(section, ArithmeticScorer())
        (pair,) = read_labelled(section.output)
        rewards = pair.chosen_token_rewards
        response = pair.chosen_tokens[-len(rewards) :]
        written = rewards != -9
        assert chatml.decode(response[written].tolist()) == "Which?<|im_end|>This.<|im_end|>"
        assert "Any." in chatml.decode(response[~written].tolist())
        prompt = (Message("user", "Q?"),)
        conversation = [*prompt, Message("assistant", "Which?"), Message("user", "Any.")]
        whole = chatml.encode_prompt(conversation) + chatml.encode_response(conversation, "This.")
        assert pair.chosen_tokens.tolist() == whole
        assert (pair.chosen_ref_logprobs[~written] == 0).all() and (pair.chosen_ref_logprobs[written] != 0).all()
        ends = response == chatml.end_of_turn
        assert ((rewards[ends & written] != 0).all()) == section.reward_eot
        assert (pair.rejected_token_rewards != -9).all()


OWN = [
    row
    | {"chosen_spans": [[0, 2, i - 3.0]], "rejected_token_texts": ["It", " is not."], "rejected_token_rewards": [9, -1]}
    for i, row in enumerate(ROWS)
]
NAMED = {"revise": {"prompt_pair": "revise"}, "again": {"source": "contrastive_prompts"}, "mine": {"source": "own"}}


def test_named_values_are_those_of_labellings_of_their_own(section, tmp_path):
    """All sources in one labelling, to the last bit; a pass that two of them need is scored once."""
    jsonl(Path(section.pairs), OWN)
    named = NAMED | {"mine": {"source": "own", "squash": "sigmoid"}}
    section = dataclasses.replace(section, values=named)
    scored = []

    class Recording(ArithmeticScorer):
        def score(self, sequences, scored_=lambda sequences, tokens: None):
            scored.extend(sequences)
            return super().score(sequences, scored_)

    manifest = label(section, Recording())
    assert len(scored) == len(ROWS) * 2 * 5  # reference, and better and worse of two prompt pairs
    together = list(read_labelled(section.output))
    assert list(together[0].chosen_values) == ["again", "mine", "revise"]
    for name, changes in {"": {}, **named}.items():
        alone = dataclasses.replace(section, values={}, output=str(tmp_path / f"alone {name}"), **changes)
        means = label(alone, ArithmeticScorer())["token_rewards"]
        assert (manifest["values"][name] if name else manifest["token_rewards"]) == means
        for ours, theirs in zip(read_labelled(section.output, values=name), read_labelled(alone.output), strict=True):
            for column in ("chosen_token_rewards", "rejected_token_rewards", "chosen_ref_logprobs", "chosen_tokens"):
                np.testing.assert_array_equal(getattr(ours, column), getattr(theirs, column))
        if not name:
            assert all(
                "values" not in (read_shard_metadata(path) or {})["run"] for path in labelled_files(alone.output)
            )
    mine = together[6].chosen_values["mine"]
    assert mine[0] == np.float32(1 / (1 + np.exp(-3)) - 0.5) and mine[-1] == 0
    run = labelling_run(section.output)
    assert run["values"]["mine"] == {"source": {"kind": "own", "squash": "sigmoid"}}
    assert run["values"]["again"] == {"prompt_pair": run["prompt_pair"]} != run["values"]["revise"]


def test_a_stopped_job_with_named_values_goes_on_as_the_same_run_only(section, tmp_path):
    jsonl(Path(section.pairs), [row | {"rejected_token_rewards": [0.5, -0.5], "chosen_spans": []} for row in OWN])
    section = dataclasses.replace(section, values=NAMED)
    uninterrupted = dataclasses.replace(section, output=str(tmp_path / "uninterrupted"))
    label(uninterrupted, ArithmeticScorer())
    with pytest.raises(KeyboardInterrupt):
        label(section, ArithmeticScorer(fail_after=1))
    for values in ({}, NAMED | {"mine": {"source": "own", "squash": "clip"}}, NAMED | {"more": {"source": "own"}}):
        with pytest.raises(UserError, match="is a run with another values; name another label.output"):
            label(dataclasses.replace(section, values=values), ArithmeticScorer())
    label(section, scorer := ArithmeticScorer())
    assert scorer.calls == 2 and contents(section.output) == contents(uninterrupted.output)


def test_a_changed_value_of_the_user_labels_its_shard_anew(section):
    section = dataclasses.replace(section, source="own", squash="tanh")
    jsonl(Path(section.pairs), OWN)
    label(section, ArithmeticScorer())
    (Path(section.output) / "manifest.json").unlink()
    jsonl(Path(section.pairs), [row | ({"chosen_spans": [[0, 2, 7.0]]} if i == 4 else {}) for i, row in enumerate(OWN)])
    label(section, scorer := ArithmeticScorer())
    assert scorer.calls == 1 and list(read_labelled(section.output))[4].chosen_token_rewards[0] == np.float32(
        0.5 * np.tanh(7)
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"source": "own"}, "row 1, pair pair 0: chosen has no token rewards: give chosen_token_rewards with"),
        ({"source": "own", "better_model": "x"}, "label.better_model belongs to label.source=model_ratio"),
        ({"values": {"Oracle": {}}}, "label.values.Oracle: a name of token rewards consists of a-z, 0-9 and _"),
        ({"values": {"x": {"promt_pair": "revise"}}}, "label.values.x.promt_pair is not a key of a source"),
        ({"values": {"x": {"source": "model"}}}, "label.values.x.source is 'model'; choose one of"),
        ({"values": {"x": {"source": "model_ratio"}}}, "label.values.x.better_model has no value"),
        (
            {"values": {"x": {"better_model": "m"}}},
            "label.values.x.better_model belongs to label.values.x.source=model",
        ),
        ({"values": {"x": {"source": "own", "ratio_scale": 2}}}, "label.values.x.ratio_scale belongs to"),
        ({"values": {"x": {"source": "own", "prompt_pair": "few_shot"}}}, "label.values.x.prompt_pair belongs to"),
        (
            {"values": {"x": {"source": "model_ratio", "better_model": "m", "ratio_scale": "big"}}},
            "label.values.x.ratio_scale: Value 'big'",
        ),
        ({"values": {"x": {"squash": "rank"}}}, "label.values.x.squash: rewards of contrastive prompts are"),
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused(section, change, message):
    with pytest.raises(UserError, match=message):
        label(dataclasses.replace(section, **change), ArithmeticScorer())
    assert not Path(section.output).exists()


def test_nothing_left_is_an_error_without_output(section):
    section.max_length = 8
    with pytest.raises(UserError, match="no pair is left .7 dropped: prompt fills max_length."):
        label(section, ArithmeticScorer())
    assert not contents(section.output)


def test_a_stopped_job_goes_on_and_ends_with_the_same_bytes(section, tmp_path):
    uninterrupted = dataclasses.replace(section, output=str(tmp_path / "uninterrupted"))
    label(uninterrupted, ArithmeticScorer())
    for done in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            label(section, ArithmeticScorer(fail_after=1))
        assert len(contents(section.output)) == done
    scorer = ArithmeticScorer()
    label(section, scorer)
    assert scorer.calls == 1
    assert contents(section.output) == contents(uninterrupted.output)
    finished = ArithmeticScorer()
    assert label(section, finished)["pairs"] == 7
    assert finished.calls == 0


@pytest.mark.parametrize("finished", [True, False])
def test_another_run_in_the_folder_is_refused(section, finished):
    label(section, ArithmeticScorer())
    if not finished:
        (Path(section.output) / "manifest.json").unlink()
    before = contents(section.output)
    for change, name in (
        ({"prompt_pair": "revise"}, "prompt_pair"),
        ({"max_length": 511}, "max_length"),
        ({"max_revision_length": 512}, "max_revision_length"),
        ({"dtype": "bfloat16"}, "reference"),
        ({"reward_eot": False}, "reward_eot"),
    ):
        with pytest.raises(UserError, match=f"is a run with another {name}; name another label.output"):
            label(dataclasses.replace(section, **change), ArithmeticScorer())
    assert contents(section.output) == before


def test_foreign_files_in_the_folder_are_refused(section):
    label(section, ArithmeticScorer())
    folder = Path(section.output)
    (folder / "manifest.json").unlink()
    (folder / "shard-00000.parquet").rename(folder / "mine.parquet")
    with pytest.raises(UserError, match="mine.parquet was not written by this run"):
        label(section, ArithmeticScorer())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pairs": "absent.json"}, "absent.json cannot be read"),
        ({"model": "absent"}, "tokenizer folder absent does not exist"),
        ({"prompt_pair": "absent"}, "prompt pair absent is neither built in"),
        ({"max_length": 4096}, "label.max_length=4096 exceeds the 1024 positions"),
        ({"max_revision_length": 4096}, "label.max_revision_length=4096 exceeds the 1024 positions"),
        ({"shard_pairs": 0}, "label.shard_pairs=0 must be at least 1"),
        ({"engine": "megatron", "tensor": 2}, "label.tensor=2 x label.pipeline=1 does not divide 1 processes; start a"),
    ],
)
def test_bad_settings(section, change, message):
    with pytest.raises(UserError, match=message):
        label(dataclasses.replace(section, **change), ArithmeticScorer())
    assert not Path(section.output).exists()


def test_a_model_that_gives_nonsense_is_refused(section):
    class Broken(ArithmeticScorer):
        @staticmethod
        def logps(sequence):
            return np.full(len(sequence.response_ids), np.nan, np.float32)

    with pytest.raises(UserError, match=r"non-finite log-probs for pair pair 0 \(chosen\)"):
        label(section, Broken())
    assert not Path(section.output).exists() or not contents(section.output)


def run_tool(monkeypatch, name, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    try:
        runpy.run_path(str(TOOLS / name), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


def test_from_pairs_to_streams_by_the_tools(section, tmp_path, monkeypatch, capsys):
    arguments = [
        "--model",
        section.model,
        "--output",
        section.output,
        "--dtype",
        "float32",
        "--max-length",
        "512",
        "--prompt-pair",
        "few_shot",
    ]
    assert run_tool(monkeypatch, "label_tokens.py", "--pairs", section.pairs, *arguments) == 0
    prefix = str(tmp_path / "streams" / "train")
    assert (
        run_tool(
            monkeypatch,
            "index_pairs.py",
            "--labelled",
            section.output,
            "--output",
            prefix,
            "--tokenizer",
            section.model,
        )
        == 0
    )
    labelled, indexed = capsys.readouterr().out.splitlines()
    assert labelled.startswith("labelled 7 pairs to ") and indexed.startswith("indexed 7 pairs, ")
    streams = open_streams(prefix)
    assert streams.manifest["labels"] == labelling_run(section.output)
    for record, pair in zip((streams[i] for i in range(7)), read_labelled(section.output), strict=True):
        for name, value in record._asdict().items():
            np.testing.assert_array_equal(value, getattr(pair, name))


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("label_tokens.py", ["--pairs", "absent.json"], "pairs file absent.json cannot be read"),
        ("label_tokens.py", [], "label.pairs has no value"),
        ("index_pairs.py", ["--labelled", "absent", "--output", "x"], "labelled pairs absent do not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(section, tmp_path, monkeypatch, capsys, name, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run_tool(monkeypatch, name, *arguments, f"model.hf={section.model}", "run=out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_named_template_is_used_and_recorded_from_labels_to_dataset(section, chatml, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(section.model, folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "owl.jinja").write_text("Owl: " + chatml.template)
    named = dataclasses.replace(section, model=str(folder), template="owl")
    manifest = label(named, ArithmeticScorer())
    assert manifest["run"]["tokenizer"]["chat_template"] == "owl"
    assert all(chatml.decode(pair.chosen_tokens).startswith("Owl: ") for pair in read_labelled(named.output))
    with pytest.raises(UserError, match="labelled"):  # it is another run
        label(dataclasses.replace(named, template=None), ArithmeticScorer())
    made = index(IndexSection(named.output, str(tmp_path / "train"), str(folder), 1, 0))["tokenizer"]
    assert made["chat_template"] == "owl" and made["chat_template_sha256"] != chatml.template_sha256
    with pytest.raises(UserError, match="has no chat template named owl"):
        index(IndexSection(named.output, str(tmp_path / "other"), section.model, 1, 0))
    label(dataclasses.replace(section, output=str(tmp_path / "plain"), template="default"), ArithmeticScorer())
    assert "chat_template" not in labelling_run(tmp_path / "plain")["tokenizer"]


def test_unfinished_labels_are_not_indexed(section, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        label(section, ArithmeticScorer(fail_after=1))
    with pytest.raises(UserError, match="its labelling job is unfinished"):
        index(IndexSection(section.output, str(tmp_path / "t"), section.model, workers=1, validation_fraction=0.0))
