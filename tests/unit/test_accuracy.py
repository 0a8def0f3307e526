"""The step `accuracy`: log-probs against plain transformers, figures against training's, the cache, and resuming."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.file_operations import contents
from tests.support.objectives import PLAIN_DPO
from tests.support.tiny import tiny_llama, tiny_pair, tiny_tokenizer
from treg_megatron.cli.accuracy import lines
from treg_megatron.config.schema import AccuracySection, LabelSection
from treg_megatron.errors import UserError
from treg_megatron.evaluation.accuracy.cluster_bootstrap import ratio_intervals
from treg_megatron.evaluation.accuracy.figures import REWARDS, PairLogProbs, preference_figures
from treg_megatron.evaluation.accuracy.job import accuracy
from treg_megatron.evaluation.accuracy.reward_bench import SECTIONS, section_averages
from treg_megatron.labelling.job import label
from treg_megatron.labelling.scoring.huggingface import HuggingFaceScorer
from treg_megatron.models.huggingface import model_identity
from treg_megatron.objective import Responses, means, preference_loss
from treg_megatron.tokenizer.chat import load_tokenizer
from treg_megatron.tokenizer.conversation import Message
from treg_megatron.utils.files import sha256_of_json, write_manifest

pytestmark = pytest.mark.slow

ROWS = [{**tiny_pair(number, f"pair {number}"), "subset": "even" if number % 2 == 0 else "odd"} for number in range(9)]


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama(folder, vocab=tiny_tokenizer(folder), seed=1)
    return folder


@pytest.fixture
def section(tiny_folder, policy_folder, tmp_path) -> AccuracySection:
    return AccuracySection(
        model=str(policy_folder),
        reference=str(tiny_folder),
        pairs=str(jsonl(tmp_path / "pairs.jsonl", ROWS)),
        format="auto",
        columns={},
        ignore=[],
        subset="subset",
        answers=None,
        output=str(tmp_path / "accuracy"),
        reference_cache=str(tmp_path / "reference"),
        beta=0.1,
        max_length=512,
        batch_tokens=512,
        dtype="float32",
        device="cpu",
        shard_pairs=4,
    )


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@functools.cache
def float64_model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).double().eval()


def plain_log_probs(folder: Path, prompt_ids: list[int], response_ids: list[int]) -> np.ndarray:
    """log p of each response token in float64, by transformers alone."""
    with torch.no_grad():
        logits = float64_model(folder)(torch.tensor([[*prompt_ids, *response_ids]])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response_ids)[:, None])[:, 0].numpy()


def of_pairs(folder: Path, rows: list[dict]) -> np.ndarray:
    """[pairs, 2]: summed log-probs of chosen and rejected."""
    tokenizer, sums = load_tokenizer(folder), []
    for row in rows:
        messages = (Message("user", row["prompt"]),)
        prompt = tokenizer.encode_prompt(messages)
        sides = [tokenizer.encode_response(messages, row[side]) for side in ("chosen", "rejected")]
        sums.append([plain_log_probs(folder, prompt, side).sum() for side in sides])
    return np.array(sums)


def test_figures_of_two_models_against_plain_transformers(section, tiny_folder, policy_folder):
    found = accuracy(section)
    policy, reference = of_pairs(policy_folder, ROWS), of_pairs(tiny_folder, ROWS)
    assert list(found["subsets"]) == ["all", "even", "odd"]
    for name, rows in (("all", slice(None)), ("even", slice(0, None, 2)), ("odd", slice(1, None, 2))):
        figures, pi, ref = found["subsets"][name], policy[rows], reference[rows]
        margin = 0.1 * ((pi - ref)[:, 0] - (pi - ref)[:, 1])
        assert figures["pairs"] == len(pi)
        assert figures["implicit_reward_accuracy"] == pytest.approx((margin > 0).mean())
        assert figures["implicit_reward_margin"] == pytest.approx(margin.mean(), abs=1e-4)
        assert figures["log_prob_accuracy"] == pytest.approx((pi[:, 0] > pi[:, 1]).mean())
        assert figures["log_prob_margin"] == pytest.approx((pi[:, 0] - pi[:, 1]).mean(), abs=1e-3)
        assert figures["reference_log_prob_accuracy"] == pytest.approx((ref[:, 0] > ref[:, 1]).mean())
        for side, change in enumerate(("chosen_logps_change", "rejected_logps_change")):
            assert figures[change] == pytest.approx((pi - ref)[:, side].mean(), abs=1e-3)
    assert found["sections"] is None and found["kl"] is None and found["drops"] == {}


@pytest.mark.parametrize(
    "loss_type, reward",
    [("dpo", "implicit_reward"), ("dpo_norm", "implicit_reward_per_token"), ("simpo", "log_prob_per_token")],
)
def test_figures_are_the_metrics_of_training(loss_type, reward):
    """Accuracies and margins equal rewards/accuracies and rewards/margins of the objective on the same log-probs."""
    random, beta, pairs = np.random.default_rng(3), 0.3, 50
    lengths = random.integers(1, 9, 2 * pairs).tolist()
    policy, reference = (-torch.from_numpy(random.exponential(2, sum(lengths))) for _ in range(2))
    objective = dataclasses.replace(PLAIN_DPO, loss_type=loss_type, beta=beta, token_rewards="none")
    _, sums = preference_loss(policy.float(), reference.float(), None, Responses.whole(lengths), objective)
    expected = means({name: float(value) for name, value in sums.items()})

    def by_side(values: torch.Tensor) -> np.ndarray:
        return np.array([float(part.sum()) for part in values.split(lengths)]).reshape(pairs, 2)

    log_probs = PairLogProbs(by_side(policy), by_side(reference), np.array(lengths).reshape(pairs, 2), np.arange(pairs))
    figures = preference_figures(log_probs, beta, 0.95)
    scale = beta if loss_type == "simpo" else 1.0  # SimPO's reward is beta times the mean log-prob
    assert figures[f"{reward}_accuracy"] == pytest.approx(expected["rewards/accuracies"])
    assert scale * figures[f"{reward}_margin"] == pytest.approx(expected["rewards/margins"], abs=1e-5)
    assert figures["log_prob_margin"] == pytest.approx(expected["logps/chosen"] - expected["logps/rejected"], abs=1e-4)
    others = {figures[f"{name}_margin"] for name in REWARDS}
    assert len(others) == len(REWARDS)


def test_a_tie_is_no_success():
    same = np.full((3, 2), -4.0)
    figures = preference_figures(PairLogProbs(same, same, np.ones((3, 2)), np.arange(3)), 0.1, 0.95)
    assert figures["implicit_reward_accuracy"] == figures["log_prob_accuracy"] == 0


def test_labelled_pairs_bring_the_reference(section, tiny_folder, tmp_path):
    """Figures from labels equal those from the pairs; the reference model need not be there, nor its cache."""
    whole = accuracy(section)
    labels = LabelSection(
        model=str(tiny_folder),
        template=None,
        pairs=section.pairs,
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
    label(labels)
    from_labels = dataclasses.replace(
        section,
        pairs=labels.output,
        reference="nowhere",
        output=str(tmp_path / "from_labels"),
        reference_cache=str(tmp_path / "unused"),
    )
    found = accuracy(from_labels)
    assert found["reference"] == whole["reference"] and not Path(from_labels.reference_cache).exists()
    assert list(found["subsets"]) == ["all"]
    for name, value in whole["subsets"]["all"].items():
        assert found["subsets"]["all"][name] == pytest.approx(value, abs=1e-3), name


def test_policies_share_the_reference_and_a_model_is_loaded_only_for_what_is_new(section, tiny_folder, monkeypatch):
    loaded = []
    real = HuggingFaceScorer.__init__
    monkeypatch.setattr(
        HuggingFaceScorer, "__init__", lambda self, folder, *rest: (loaded.append(folder), real(self, folder, *rest))[1]
    )
    accuracy(section)
    assert loaded == [section.model, section.reference]
    other = dataclasses.replace(section, model=str(tiny_folder), output=section.output + "_other")
    found = accuracy(other)
    assert loaded[2:] == [other.model]  # the reference's log-probs are there
    assert found["subsets"]["all"]["implicit_reward_margin"] == 0  # the policy is the reference
    assert accuracy(dataclasses.replace(section, beta=0.5))["subsets"]["all"]["implicit_reward_margin"] == (
        pytest.approx(5 * accuracy(section)["subsets"]["all"]["implicit_reward_margin"])
    )
    assert len(loaded) == 3  # another beta needs no model


def test_an_interrupted_job_goes_on_and_repeats_nothing(section, tmp_path, monkeypatch):
    uninterrupted = dataclasses.replace(
        section, output=str(tmp_path / "whole"), reference_cache=str(tmp_path / "whole" / "reference")
    )
    expected = accuracy(uninterrupted)
    calls, real = [], HuggingFaceScorer.score

    def score(self, sequences, *rest):
        calls.append([tuple(one.response_ids) for one in sequences])
        if len(calls) in stops:
            raise KeyboardInterrupt
        return real(self, sequences, *rest)

    monkeypatch.setattr(HuggingFaceScorer, "score", score)
    stops = {2, 4, 6}  # of 6 shards
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            accuracy(section)
        assert not (Path(section.output) / "accuracy.json").exists()
    stops = set()
    found = accuracy(section)
    assert found["subsets"] == expected["subsets"]
    assert len(calls) == 9  # each interrupted shard once more
    left = contents(section.output) | {f"reference/{k}": v for k, v in contents(section.reference_cache).items()}
    assert not [name for name in left if ".lock" in str(name) or "partial" in str(name)]


def test_shards_of_another_run_are_refused(section, tiny_folder, tmp_path):
    accuracy(section)
    before = contents(section.output)
    with pytest.raises(UserError, match="is a run with another model; name another accuracy.output"):
        accuracy(dataclasses.replace(section, model=str(tiny_folder)))
    with pytest.raises(UserError, match="is a run with another max_length; name another accuracy.reference_cache"):
        accuracy(dataclasses.replace(section, output=str(tmp_path / "o"), max_length=256))
    jsonl(Path(section.pairs), ROWS[1:])
    with pytest.raises(UserError, match="is a run with another pairs"):
        accuracy(section)
    assert contents(section.output) == before


def test_a_damaged_shard_is_named(section):
    accuracy(section)
    (Path(section.output) / "accuracy.json").unlink()
    shard = Path(section.output) / "policy" / "log-probs-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 4] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(UserError, match="log-probs-00001.parquet cannot be read.*delete it and run the command again"):
        accuracy(section)


def test_models_with_different_tokenizers_are_refused(section, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    tiny_llama(folder, vocab=tiny_tokenizer(folder, template="headers"))
    with pytest.raises(UserError, match="other has another tokenizer than"):
        accuracy(dataclasses.replace(section, reference=str(folder)))


def test_long_pairs_are_dropped_and_counted_and_none_left_is_an_error(section):
    rows = [*ROWS, {"prompt": "Q?", "chosen": "yes " * 600, "rejected": "no"}]
    jsonl(Path(section.pairs), rows)
    found = accuracy(section)
    assert found["subsets"]["all"]["pairs"] == len(ROWS)
    assert found["drops"] == {"prompt and response do not fit max_length": 1}
    with pytest.raises(UserError, match="no pair is left"):
        accuracy(dataclasses.replace(section, max_length=4))


def test_of_several_turns_only_the_assistant_is_scored(section, tiny_folder, policy_folder):
    start = [{"role": "user", "content": "Q?"}]
    more = [{"role": "assistant", "content": "Which?"}, {"role": "user", "content": "Any."}]
    row = {
        "chosen": [*start, *more, {"role": "assistant", "content": "This."}],
        "rejected": [*start, {"role": "assistant", "content": "No."}],
    }
    jsonl(Path(section.pairs), [row])
    figures = accuracy(section)["subsets"]["all"]
    tokenizer = load_tokenizer(policy_folder)
    prompt = tokenizer.encode_prompt((Message("user", "Q?"),))
    whole, scored = tokenizer.encode_turns(
        (Message("user", "Q?"),), tuple(Message(m["role"], m["content"]) for m in row["chosen"][1:])
    )
    change = [plain_log_probs(folder, prompt, whole)[scored].sum() for folder in (policy_folder, tiny_folder)]
    assert not scored.all()
    assert figures["chosen_logps_change"] == pytest.approx(change[0] - change[1], abs=1e-3)


# -- KL -------------------------------------------------------------------------------------------------------------


def write_answers(folder: Path, rows: list[dict], model: dict | None = None, **settings) -> str:
    """An answers folder as `treg answers` writes it."""
    folder.mkdir(parents=True)
    (folder / "answers-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = sha256_of_json(sorted([row["prompt_id"], row["messages"]] for row in rows))
    content = {
        "name": "policy",
        "benchmark": "prompts",
        "prompts": len(rows),
        "prompts_sha256": prompts,
        "settings": {"temperature": 1.0, "top_p": 1.0, **settings},
        "shards": ["answers-00000.jsonl"],
        "files": [],
        "run": {"model": model},
    }
    write_manifest(folder / "manifest.json", "treg-megatron answers", 1, content)
    return str(folder)


def sampled_answers(folders: dict[str, Path], prompts: int, length: int) -> tuple[list[dict], float]:
    """Answers that plain transformers sampled, and the mean of the exact KL(seed 1 || seed 0) along them per token."""
    tokenizer = load_tokenizer(folders["policy"])
    models = {who: float64_model(path) for who, path in folders.items()}
    generator = torch.Generator().manual_seed(0)
    texts = [f"{number + 100}: what now?" for number in range(prompts)]
    ids = torch.tensor([tokenizer.encode_prompt((Message("user", text),)) for text in texts])  # of one length
    sampled, exact = torch.empty(prompts, 0, dtype=torch.int64), []
    for _ in range(length):
        with torch.no_grad():
            p, q = (
                models[who](torch.cat([ids, sampled], 1)).logits[:, -1].log_softmax(-1)
                for who in ("policy", "reference")
            )
        exact.append(float((p.exp() * (p - q)).sum(-1).mean()))
        sampled = torch.cat([sampled, torch.multinomial(p.exp(), 1, generator=generator)], 1)
    rows = []
    for number, (text, answer) in enumerate(zip(texts, sampled.tolist())):
        one = {"text": tokenizer.decode(answer), "ids": answer, "finished": False, "tokens": length}
        messages = [{"role": "user", "content": text}]
        rows.append({"prompt_id": str(number), "messages": messages, "answers": [one], "category": None})
    return rows, float(np.mean(exact))


def test_the_kl_on_own_samples_holds_the_exact_one(section, tiny_folder, policy_folder, tmp_path):
    """Two models that are near each other; exact: the whole vocabulary summed at every position of the answers."""
    from safetensors.torch import load_file, save_file

    near = tmp_path / "near"
    near.mkdir()
    for path in tiny_folder.iterdir():
        (near / path.name).write_bytes(path.read_bytes())
    weights, other = (load_file(path / "model.safetensors") for path in (tiny_folder, policy_folder))
    mixed = {name: value + 0.2 * other[name] for name, value in weights.items()}
    save_file(mixed, near / "model.safetensors", {"format": "pt"})
    rows, exact = sampled_answers({"policy": near, "reference": tiny_folder}, 200, 6)
    section.model, section.answers = str(near), write_answers(tmp_path / "answers", rows)
    kl = accuracy(section)["kl"]
    low, high = kl["nats_per_token_interval"]
    assert (kl["prompts"], kl["tokens"]) == (200, 1200) and kl["sampled"]["exact"]
    assert 0.1 < exact < 2 and high - low < 0.3 * exact
    assert abs(kl["nats_per_token"] - exact) < high - low  # 4 standard errors
    assert kl["nats_per_answer"] == pytest.approx(6 * kl["nats_per_token"])
    low, high = kl["log_ratio_per_token_interval"]
    assert abs(kl["log_ratio_per_token"] - exact) < high - low


def test_the_kl_of_the_reference_from_itself_is_0_and_of_tempered_samples_warned_of(
    section, tiny_folder, tmp_path, caplog
):
    rows, _ = sampled_answers({"policy": tiny_folder, "reference": tiny_folder}, 3, 2)
    section.model = section.reference = str(tiny_folder)
    section.answers = write_answers(tmp_path / "answers", rows, temperature=0.7)
    kl = accuracy(section)["kl"]
    assert kl["nats_per_token"] == 0 and kl["nats_per_token_interval"] == [0, 0]
    assert not kl["sampled"]["exact"] and "sampled at temperature 0.7 and top_p 1.0" in caplog.text


def test_a_second_turn_is_scored_after_the_first(section, tiny_folder, policy_folder, tmp_path):
    tokenizer = load_tokenizer(policy_folder)
    turns = [Message("user", "One?"), Message("user", "Two?")]
    ids = [tokenizer.encode_response(turns[:1], text) for text in ("It is.", "It was.")]
    answers = [
        {"text": text, "ids": one, "finished": True, "tokens": len(one)}
        for text, one in zip(("It is.", "It was."), ids)
    ]
    row = {"prompt_id": "a", "messages": [t.as_dict() for t in turns], "answers": answers, "category": None}
    section.answers = write_answers(tmp_path / "answers", [row])
    kl = accuracy(section)["kl"]
    prompts = [
        tokenizer.encode_prompt(turns[:1]),
        tokenizer.encode_prompt([turns[0], Message("assistant", "It is."), turns[1]]),
    ]
    ratio = np.concatenate(
        [
            plain_log_probs(policy_folder, prompt, one) - plain_log_probs(tiny_folder, prompt, one)
            for prompt, one in zip(prompts, ids)
        ]
    )
    assert kl["log_ratio_per_token"] == pytest.approx(ratio.mean(), abs=1e-4)
    assert kl["nats_per_answer"] == pytest.approx((np.exp(-ratio) - 1 + ratio).sum() / 2, rel=1e-3)


def test_answers_without_ids_or_of_another_model_are_refused(section, tiny_folder, policy_folder, tmp_path):
    answer = {"text": "yes", "ids": None, "finished": True, "tokens": None}
    row = {"prompt_id": "a", "messages": [{"role": "user", "content": "Q?"}], "answers": [answer]}
    section.answers = write_answers(tmp_path / "answers", [row])
    with pytest.raises(UserError, match="the answer to a has no sampled ids"):
        accuracy(section)
    section.answers = write_answers(tmp_path / "others", [row], model_identity(tiny_folder))
    with pytest.raises(UserError, match="others holds answers of another model than .*policy"):
        accuracy(section)
    section.answers = write_answers(tmp_path / "own", [row], model_identity(policy_folder))
    with pytest.raises(UserError, match="no sampled ids"):
        accuracy(section)


def test_an_empty_answer_is_left_out(section, policy_folder, tmp_path):
    """As where the prompt left no position for one."""
    rows = []
    for number, ids in enumerate(([5, 6, 7], [])):
        answer = {"text": "x" if ids else "", "ids": ids, "finished": False, "tokens": len(ids)}
        messages = [{"role": "user", "content": f"Q{number}?"}]
        rows.append({"prompt_id": str(number), "messages": messages, "answers": [answer], "category": None})
    section.answers = write_answers(tmp_path / "answers", rows)
    kl = accuracy(section)["kl"]
    assert (kl["prompts"], kl["tokens"]) == (1, 3)
    assert f"KL from the reference on 1 prompts: {kl['nats_per_token']:.4f} [" in "\n".join(lines(accuracy(section)))


def test_a_run_is_measured_by_its_export(section, policy_folder, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(policy_folder, tmp_path / "run" / "hf")
    section.model = str(tmp_path / "run")
    assert accuracy(section)["model"]["name"] == "hf"


# -- RewardBench and intervals ---------------------------------------------------------------------------------------


def test_sections_of_reward_bench_by_hand():
    assert section_averages({"mine": 0.5}) == {}
    some = section_averages({"math-prm": 0.5, "hep-cpp": 1.0, "donotanswer": 0.25, "mine": 0.0})
    assert some == {"Safety": 0.25, "Reasoning": pytest.approx((984 * 0.5 + 164 * 1.0) / 1148)}
    accuracies = {subset: 0.25 * number for number, subsets in enumerate(SECTIONS.values()) for subset in subsets}
    whole = section_averages(accuracies)
    assert whole["score"] == pytest.approx(0.375) and whole["Chat Hard"] == pytest.approx(0.25)
    assert sum(map(len, SECTIONS.values())) == 23
    pairs = sum(sum(subsets.values()) for subsets in SECTIONS.values())
    assert pairs - 984 + 447 == 2985  # the size of its filtered split


def test_a_file_in_the_form_of_reward_bench(section):
    rows = [
        {
            "id": number,
            "prompt": row["prompt"],
            "chosen": row["chosen"],
            "chosen_model": "a",
            "rejected": row["rejected"],
            "rejected_model": "b",
            "subset": "math-prm" if number < 3 else "hep-rust",
        }
        for number, row in enumerate(ROWS)
    ]
    jsonl(Path(section.pairs), rows)
    found = accuracy(section)
    math, rust = (found["subsets"][name]["implicit_reward_accuracy"] for name in ("math-prm", "hep-rust"))
    expected = pytest.approx((984 * math + 164 * rust) / 1148)
    assert found["sections"]["implicit_reward"] == {"Reasoning": expected}
    assert set(found["sections"]) == set(REWARDS)
    text = "\n".join(lines(found))
    assert re.search(r"^math-prm +3 +\d+\.\d% \[\d+\.\d%, \d+\.\d%\]", text, re.MULTILINE)
    assert "RewardBench Reasoning: " in text and text.endswith("dropped: none")


def test_intervals_of_means_are_those_of_the_normal_law_and_count_prompts():
    random = np.random.default_rng(1)
    values = random.normal(2, 3, 2000)[:, None]
    ones = np.ones_like(values)
    (mean,), (ends,) = ratio_intervals(values, ones, np.arange(2000), 0.95)
    expected = 1.96 * values.std() / 2000**0.5
    assert mean == pytest.approx(values.mean())
    np.testing.assert_allclose(ends, [mean - expected, mean + expected], atol=0.1 * expected)
    # each observation four times, of the same prompt: nothing was learnt
    prompts = np.tile(np.arange(2000), 4)
    _, (again,) = ratio_intervals(np.tile(values, (4, 1)), np.tile(ones, (4, 1)), prompts, 0.95)
    np.testing.assert_allclose(again, ends)
    _, (narrow,) = ratio_intervals(np.tile(values, (4, 1)), np.tile(ones, (4, 1)), np.arange(8000), 0.95)
    assert np.ptp(narrow) == pytest.approx(np.ptp(ends) / 2, rel=0.1)


def test_an_interval_of_a_ratio_resamples_both_sums():
    lengths = np.arange(1.0, 401.0)[:, None]
    (ratio,), (ends,) = ratio_intervals(3 * lengths, lengths, np.arange(400), 0.95)
    assert ratio == 3 and ends.tolist() == [3, 3]  # the sum alone varies by 6 %
