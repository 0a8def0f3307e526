"""Judging that is killed, and reward models as judges."""

import dataclasses
import json
import random

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from tests.support.judge_storm import storm
from tests.support.judging_server import alpaca_eval_file
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.errors import UserError
from treg_megatron.evaluation.judge import judge
from treg_megatron.evaluation.judges.scores import ScoreJudge
from treg_megatron.evaluation.judgment_folder import read_judgments


def test_kills_cost_nothing_twice_and_lose_nothing(tmp_path):
    counts = storm(tmp_path, kills=4, prompts=60, seed=random.randrange(1000), options={"kind": "arena_hard"})
    assert (counts["paid_twice"], counts["lost"]) == (0, 0) and counts["kills"] > 0


@pytest.fixture
def settings(tiny_folder, tmp_path):
    """Four prompts, to be judged by a random Llama with one output class."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=384, num_labels=1, pad_token_id=0, initializer_range=0.2, **shape)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward_model")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "reward_model")
    for name, words in (("arm", [3, 1, 4, 1]), ("base", [2, 7, 1, 8])):
        (tmp_path / f"{name}.json").write_text(json.dumps(alpaca_eval_file(name, words)))
    overrides = {
        "arm": tmp_path / "arm.json",
        "baseline": tmp_path / "base.json",
        "output": tmp_path / "judged",
        "kind": "reward_model",
        "reward_model": tmp_path / "reward_model",
        "dtype": "float32",
        "device": "cpu",
        "shard_prompts": 1,
    }
    return section(load_recipe(overrides=[f"judge.{key}={value}" for key, value in overrides.items()]), "judge")


def test_a_reward_model_judges_by_its_scores(settings, tmp_path):
    manifest = judge(settings)
    assert manifest["judge"]["kind"] == "reward_model" and manifest["judge"]["name"] == "reward_model"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward_model")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "reward_model")

    def score(row):
        conversation = [
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": row["output"]},
        ]
        with torch.no_grad():
            return model(tokenizer.apply_chat_template(conversation, return_tensors="pt")).logits.item()

    sides = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("arm", "base")]
    for row, arm, baseline in zip(read_judgments(settings.output).rows, *sides, strict=True):
        assert row["arm_score"] == pytest.approx(score(arm), abs=1e-5)
        assert row["baseline_score"] == pytest.approx(score(baseline), abs=1e-5)
        assert row["preference"] == (row["arm_score"] > row["baseline_score"])


def test_a_stopped_judge_resumes_with_the_rest(settings, tmp_path, monkeypatch):
    real, judged = ScoreJudge.judgments, []

    def stops(self, pairs):
        if len(judged) == 2:
            raise KeyboardInterrupt
        judged.append(pairs[0].prompt_id)
        yield from real(self, pairs)

    monkeypatch.setattr(ScoreJudge, "judgments", stops)
    with pytest.raises(KeyboardInterrupt):
        judge(settings)
    judged.append("stopped")
    assert judge(settings)["judged"] == 4
    assert len(judged) == len(set(judged)) == 5
    monkeypatch.setattr(ScoreJudge, "judgments", real)
    whole = dataclasses.replace(settings, output=str(tmp_path / "whole"))
    judge(whole)
    assert read_judgments(whole.output).rows == read_judgments(settings.output).rows
    model = LlamaForSequenceClassification.from_pretrained(settings.reward_model)
    model.score.weight.data += 1
    model.save_pretrained(settings.reward_model)
    with pytest.raises(UserError, match="holds judgments with another judge"):
        judge(settings)


def test_code_of_a_reward_model_needs_consent(settings, tmp_path):
    config = tmp_path / "reward_model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoModel": "modeling.Custom"}}))
    with pytest.raises(UserError, match="judge.allow_remote_code=true"):
        judge(settings)
