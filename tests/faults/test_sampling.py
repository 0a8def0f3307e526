"""Sampling and ranking: ids as sampled, no double BOS, resuming, ties, and servers that go down."""

import contextlib
import dataclasses
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.data.pairs import read_pairs
from treg_megatron.errors import UserError
from treg_megatron.sampling import rank as ranking
from treg_megatron.sampling import server
from treg_megatron.sampling.decoding import Decoding
from treg_megatron.sampling.huggingface import HuggingFaceSampler
from treg_megatron.sampling.rank import best_and_worst, rank
from treg_megatron.sampling.sample import sample
from treg_megatron.tokenizer.chat import load_tokenizer
from treg_megatron.tokenizer.conversation import Message
from treg_megatron.utils import http as http_requests

DECODING = Decoding(temperature=0.8, top_p=0.95, max_new_tokens=4)


@pytest.fixture
def settings(tiny_folder, tmp_path):
    rows = [{"prompt_id": f"q{i}", "prompt": f"Question {i}?"} for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return section(
        load_recipe(
            overrides=[
                f"model.hf={tiny_folder}",
                f"run={tmp_path}",
                f"sample.prompts={tmp_path}/prompts.jsonl",
                "sample.dtype=float32",
                "sample.device=cpu",
                "sample.seeds=[1,2,3]",
                "sample.max_new_tokens=4",
                "sample.shard_prompts=2",
                "sample.batch_prompts=2",
                "sample.max_attempts=2",
            ]
        ),
        "sample",
    )


def rank_settings(settings, **changes):
    found = section(
        load_recipe(
            overrides=[
                f"rank.samples={settings.output}",
                f"model.hf={settings.model}",
                f"rank.output={Path(settings.output).parent}/pairs.jsonl",
            ]
        ),
        "rank",
    )
    return dataclasses.replace(found, **changes)


def rows_of(settings):
    return [
        json.loads(line)
        for path in sorted(Path(settings.output).glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


class Counting:
    """Sampler whose responses depend on the seed; it may stop as if killed."""

    def __init__(self, tokenizer, stop_after=None):
        self.tokenizer, self.calls, self.stop_after = tokenizer, [], stop_after

    def sample(self, prompts, seed, decoding):
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((prompts, seed))
        end = self.tokenizer.end_of_turn
        return [self.tokenizer.sampled([10 + seed % 90, 11] + [end] * (seed % 3 > 0) + [end]) for _ in prompts]


def test_samples_carry_ids(settings, chatml):
    sampler = Counting(chatml)
    manifest = sample(settings, sampler)
    assert (manifest["prompts"], manifest["responses"], manifest["truncated"]) == (5, 15, 0)
    rows = rows_of(settings)
    assert [row["prompt_id"] for row in rows] == [f"q{i}" for i in range(5)]
    for row in rows:
        assert [response["seed"] for response in row["responses"]] == [1, 2, 3]
        for response in row["responses"]:
            assert response["ids"][-1] == chatml.end_of_turn and response["ids"].count(chatml.end_of_turn) == 1
            assert chatml.decode(response["ids"][:-1]) == response["text"]


def test_a_prompt_is_sent_with_one_bos(settings, http, tokenizer_folders):
    """This tokenizer's template begins with a BOS, and a server that received text would prepend another."""
    sample(
        dataclasses.replace(
            settings,
            model=str(tokenizer_folders["headers"]),
            engine="server",
            server=f"http://127.0.0.1:{http.server_port}/v1",
        )
    )
    bos = load_tokenizer(tokenizer_folders["headers"]).encode_prompt((Message("user", "x"),))[0]
    assert len(http.asked) == 15
    assert all(asked["prompt"][0] == bos and asked["prompt"].count(bos) == 1 for asked in http.asked)


def test_hugging_face_samples_and_marks_truncated_responses(settings, chatml):
    sampler = HuggingFaceSampler(settings, chatml)
    prompts = [[5, 6, 7], [8]]
    first, again = sampler.sample(prompts, 1, DECODING), sampler.sample(prompts, 1, DECODING)
    assert first == again != sampler.sample(prompts, 2, DECODING)
    for response in first:
        assert response.finished == (response.ids[-1] == chatml.end_of_turn) and len(response.ids) <= 4
    assert not chatml.sampled([10, 11]).finished


def test_prompts_may_lie_in_several_files(settings, tmp_path):
    text = (tmp_path / "prompts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part-1.jsonl").write_text("".join(text[:2]))
    (tmp_path / "part-2.jsonl").write_text("".join(text[2:]))
    sample(settings)
    sample(dataclasses.replace(settings, prompts=f"{tmp_path}/part-*.jsonl", output=f"{tmp_path}/parts"))
    written = {path.name: path.read_bytes() for path in Path(settings.output).glob("*.jsonl")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "parts").glob("*.jsonl")} == written != {}
    manifest = (tmp_path / "parts" / "manifest.json").read_text()
    assert json.loads(manifest)["run"]["prompts"]["file"] == "part-*.jsonl"


def test_temperature_0_takes_the_likeliest_token(settings, chatml):
    sampler, greedy = HuggingFaceSampler(settings, chatml), DECODING._replace(temperature=0.0)
    first, other = sampler.sample([[5, 6, 7]], 1, greedy), sampler.sample([[5, 6, 7]], 2, greedy)
    assert first == other
    with torch.inference_mode():
        logits = sampler._model(torch.tensor([[5, 6, 7, *first[0].ids]])).logits[0, 2:-1]
    assert logits.argmax(-1).tolist() == first[0].ids


def test_a_stopped_job_resumes_with_the_same_result(settings, chatml, tmp_path):
    uninterrupted = dataclasses.replace(settings, output=str(tmp_path / "uninterrupted"))
    sample(uninterrupted, Counting(chatml))
    with pytest.raises(KeyboardInterrupt):
        sample(settings, Counting(chatml, stop_after=4))
    resumed = Counting(chatml)
    sample(settings, resumed)
    assert len(resumed.calls) == 6
    assert rows_of(settings) == rows_of(uninterrupted)
    with pytest.raises(UserError, match="holds samples with another temperature"):
        sample(dataclasses.replace(settings, temperature=1.0), resumed)


@pytest.mark.parametrize(
    "scores, lengths, expected",
    [
        ([1, 3, 2], [5, 5, 5], (1, 0)),
        ([3, 3, 1], [9, 4, 5], (1, 2)),
        ([3, 1, 1, 1], [6, 1, 7, 9], (0, 2)),
    ],
)
def test_best_and_worst_with_ties(scores, lengths, expected):
    assert best_and_worst(scores, lengths) == expected


def test_ranked_pairs_keep_the_sampled_ids(settings, chatml):
    sample(settings, Counting(chatml))
    ranked = rank(rank_settings(settings, scores="function", function="tests.faults.test_sampling:by_text"))
    assert ranked.pairs == 5
    for pair in read_pairs(Path(settings.output).parent / "pairs.jsonl"):
        assert pair.chosen > pair.rejected and pair.tokenizer == chatml.sha256
        assert chatml.sampled(pair.chosen_ids).text == pair.chosen
        assert pair.chosen_score > pair.rejected_score


def by_text(messages, responses):
    return [sorted(responses).index(response) for response in responses]


def test_unrankable_prompts_are_dropped_and_counted(settings, chatml):
    sample(settings, Counting(chatml))
    for path in sorted(Path(settings.output).glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            scores = {"q0": (1, 1, 1), "q1": (2, 2, 1)}.get(row["prompt_id"], (1, 2, 3))
            for response, score in zip(row["responses"], scores):
                response["score"] = score
            if row["prompt_id"] == "q2":
                for response in row["responses"]:
                    response["text"] = "same"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ranked = rank(rank_settings(settings, scores="column", column="score"))
    assert ranked.pairs == 3
    assert ranked.dropped_prompts == {ranking.EQUAL_SCORES: 1, ranking.IDENTICAL_RESPONSES: 1}
    assert ranked.dropped_responses == {ranking.REPEATED_RESPONSE: 2}
    with pytest.raises(UserError, match="has no key 'grade'"):
        rank(rank_settings(settings, scores="column", column="grade"))
    with pytest.raises(UserError, match="rank.reward_model has no value"):
        rank(rank_settings(settings))


@pytest.fixture
def reward_model(settings, tmp_path) -> Path:
    """A random Llama with one output class, and the chat template of the sampled model."""
    folder = tmp_path / "reward_model"
    torch.manual_seed(0)
    LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_labels=1,
            pad_token_id=0,
            initializer_range=0.2,
        )
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(settings.model).save_pretrained(folder)
    return folder


def test_a_reward_model_ranks(settings, chatml, reward_model):
    sample(settings, Counting(chatml))
    chosen = rank_settings(settings, reward_model=str(reward_model), dtype="float32", device="cpu")
    assert rank(chosen).pairs == 5
    model = LlamaForSequenceClassification.from_pretrained(reward_model)
    responses = {row["prompt_id"]: row["responses"] for row in rows_of(settings)}
    for pair in read_pairs(chosen.output):
        scores = {}
        for text in {response["text"] for response in responses[pair.pair_id]}:
            ids = chatml.encode_prompt(pair.messages) + chatml.encode_response(pair.messages, text)
            rendered = chatml.decode(ids) + "\n"  # ChatML has a newline after each turn
            with torch.no_grad():
                tokens = AutoTokenizer.from_pretrained(reward_model)(rendered, return_tensors="pt").input_ids
                scores[text] = model(tokens).logits.item()
        assert pair.chosen == max(scores, key=scores.get)
        assert pair.chosen_score == pytest.approx(max(scores.values()), abs=1e-5)
        assert pair.rejected_score == pytest.approx(min(scores.values()), abs=1e-5)


def test_a_reward_model_without_a_chat_template_is_refused(settings, chatml, reward_model):
    sample(settings, Counting(chatml))
    (reward_model / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template; the reward model needs"):
        rank(rank_settings(settings, reward_model=str(reward_model), device="cpu"))


def test_code_of_a_reward_model_needs_consent(settings, chatml, tmp_path):
    sample(settings, Counting(chatml))
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling.Custom"}}))
    with pytest.raises(UserError, match="allow_remote_code=true"):
        rank(rank_settings(settings, reward_model=str(tmp_path)))


@pytest.fixture
def http(chatml):
    """A server that answers like vLLM: ``broken`` times with status 503 first, each time after ``pause`` seconds."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"data": [{"id": "tiny"}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append(asked)
            time.sleep(self.server.pause)
            if self.server.broken > 0:
                self.server.broken -= 1
                self.send_error(503)
                return
            self.answer({"choices": [{"text": "x", "finish_reason": "stop", "token_ids": asked["prompt"][-1:]}]})

        def answer(self, content):
            with contextlib.suppress(BrokenPipeError):  # the client has stopped waiting
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.asked, running.broken, running.pause = [], 0, 0.0
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def test_a_server_gets_ids_and_failed_requests_are_repeated(settings, http, monkeypatch, chatml):
    monkeypatch.setattr(http_requests, "FIRST_PAUSE", 0.01)
    served = dataclasses.replace(settings, engine="server", server=f"http://127.0.0.1:{http.server_port}/v1")
    http.broken = 1
    assert sample(served)["responses"] == 15
    asked = http.asked[0]
    assert asked["model"] == "tiny" and asked["return_token_ids"] and all(type(i) is int for i in asked["prompt"])
    row = rows_of(served)[0]
    assert row["responses"][0]["ids"] == [asked["prompt"][-1], chatml.end_of_turn]


def test_a_server_that_goes_down_stops_the_job_which_can_resume(settings, http, monkeypatch):
    monkeypatch.setattr(http_requests, "FIRST_PAUSE", 0.01)
    served = dataclasses.replace(
        settings, engine="server", server=f"http://127.0.0.1:{http.server_port}/v1", batch_prompts=1
    )
    real, calls = server.ServerSampler.sample, []

    def goes_down(self, prompts, seed, decoding):
        calls.append(seed)
        if len(calls) == 8:
            http.broken = 1000
        return real(self, prompts, seed, decoding)

    monkeypatch.setattr(server.ServerSampler, "sample", goes_down)
    with pytest.raises(UserError, match="gave no answer in 2 attempts .the last: status 503.*rerun the same command"):
        sample(served)
    assert len(rows_of(served)) == 2
    http.broken = 0
    assert sample(served)["prompts"] == 5


def test_a_silent_or_missing_server_is_reported(settings, http, monkeypatch):
    monkeypatch.setattr(http_requests, "FIRST_PAUSE", 0.01)
    address = f"http://127.0.0.1:{http.server_port}/v1"
    served = dataclasses.replace(settings, engine="server", server=address, timeout=0.1)
    http.pause = 0.5
    with pytest.raises(UserError, match="completions gave no answer in 2 attempts .the last: timed out."):
        sample(served)
    deadline = time.monotonic() + 30  # the server may read the last request with a delay
    while len(http.asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(http.asked) == 4  # two prompts, each with one retry
    nobody = dataclasses.replace(served, server="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="127.0.0.1:9/v1/models gave no answer in 2 attempts .the last: .*refused"):
        sample(nobody)
    http.pause = 0
    assert sample(served)["prompts"] == 5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seeds": [1, 1]}, "one or more distinct numbers"),
        ({"seeds": []}, "one or more distinct numbers"),
        ({"temperature": -0.1}, "must not be negative"),
        ({"prompts": "absent.jsonl"}, "absent.jsonl"),
        ({"engine": "server"}, "sample.server has no value"),
    ],
)
def test_bad_settings(settings, change, message):
    with pytest.raises(UserError, match=message):
        sample(dataclasses.replace(settings, **change))
