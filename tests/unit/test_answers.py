"""The step `answers`: whose words they are, two turns, shares, resuming, servers, refusals."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.benchmarks import ALPACA_EVAL, MT_BENCH, evaluate_section, write_rows
from tests.support.completions import serving
from tests.support.file_operations import contents
from treg_megatron.cli import answers as command
from treg_megatron.errors import UserError
from treg_megatron.evaluation.answer_folder import prompts_hash, read_answers
from treg_megatron.evaluation.answering.job import answers
from treg_megatron.sampling.huggingface import HuggingFaceSampler
from treg_megatron.sampling.vllm import own_gpu
from treg_megatron.tokenizer.chat import load_tokenizer
from treg_megatron.tokenizer.conversation import Message

pytestmark = pytest.mark.slow


@pytest.fixture
def alpaca_eval(tiny_folder, tmp_path):
    prompts = write_rows(tmp_path / "alpaca_eval.json", ALPACA_EVAL)
    return evaluate_section(tiny_folder, prompts, tmp_path / "answers")


@pytest.fixture
def mt_bench(tiny_folder, tmp_path):
    prompts = write_rows(tmp_path / "question.jsonl", MT_BENCH)
    return evaluate_section(tiny_folder, prompts, tmp_path / "answers", "evaluate.benchmark=mt_bench")


def rows_of(section) -> list[dict]:
    return read_answers(section.output).rows


def shards(output: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(output).glob("answers-*.jsonl")}


def greedy_by_transformers(folder: Path, messages: list[dict], end: int, tokens: int) -> list[int]:
    """Ids that plain transformers generates for a conversation, with the tokenizer's own template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=end,
        pad_token_id=end,
    )
    return output[0, ids.shape[1] :].tolist()


def test_greedy_answers_are_those_of_plain_transformers(mt_bench, chatml):
    answers(dataclasses.replace(mt_bench, temperature=0.0))
    for row in rows_of(mt_bench):
        asked: list[dict] = []
        for message, answer in zip(row["messages"], row["answers"]):
            asked.append(message)
            assert answer["ids"] == greedy_by_transformers(Path(mt_bench.model), asked, chatml.end_of_turn, 6)
            asked.append({"role": "assistant", "content": answer["text"]})
        assert len(row["answers"]) == 2


@pytest.mark.slow
def test_greedy_answers_of_a_trained_model(smollm2, tmp_path):
    prompts = write_rows(tmp_path / "question.jsonl", [MT_BENCH[1]])
    section = evaluate_section(
        smollm2, prompts, tmp_path / "answers", "evaluate.benchmark=mt_bench", "evaluate.max_new_tokens=16"
    )
    answers(section)
    (row,) = rows_of(section)
    first = {"role": "assistant", "content": row["answers"][0]["text"]}
    asked = [row["messages"][0], first, row["messages"][1]]
    end = load_tokenizer(smollm2).end_of_turn
    assert row["answers"][1]["ids"] == greedy_by_transformers(smollm2, asked, end, 16)


def test_what_a_folder_holds(alpaca_eval):
    manifest = answers(alpaca_eval)
    found = read_answers(alpaca_eval.output)
    assert (found.name, found.benchmark, found.manifest) == ("arm", "alpaca_eval", manifest)
    assert [row["messages"][0]["content"] for row in found.rows] == [row["instruction"] for row in ALPACA_EVAL]
    assert [row["dataset"] for row in found.rows] == [row["dataset"] for row in ALPACA_EVAL]
    assert manifest["prompts_sha256"] == prompts_hash(found.rows) == prompts_hash(found.rows[::-1])
    assert (
        manifest["settings"]
        == found.settings
        == {
            "temperature": 0.7,
            "top_p": 1.0,
            "max_new_tokens": 6,
            "stop_tokens": [],
            "stop_strings": [],
        }
    )
    given = [answer for row in found.rows for answer in row["answers"]]
    assert manifest["truncated"] == sum(not answer["finished"] for answer in given)
    assert manifest["mean_tokens"] == sum(len(answer["ids"]) for answer in given) / len(given)
    assert manifest["mean_characters"] == sum(len(answer["text"]) for answer in given) / len(given)
    assert manifest["shards"] == sorted(shards(alpaca_eval.output)) and len(manifest["shards"]) == 4
    assert answers(alpaca_eval) == manifest  # again: nothing to do


def test_the_command_says_what_it_wrote(alpaca_eval, capsys):
    words = ["--model", alpaca_eval.model, "--prompts", alpaca_eval.prompts, "--output", alpaca_eval.output]
    words += ["--name", "arm", "--max-new-tokens", "2", "--stop-strings", "a b", "c", "--dtype", "float32"]
    command.run(command.parser("treg answers").parse_args(words))
    manifest = read_answers(alpaca_eval.output).manifest
    assert manifest["settings"]["stop_strings"] == ["a b", "c"]
    said = capsys.readouterr().out
    assert said.startswith(
        f"arm answered 7 prompts of alpaca_eval into {alpaca_eval.output} (alpaca_eval.json); on average"
    )
    assert said.endswith(f"characters; {manifest['truncated']} answers were cut off\n")


def test_temperature_follows_the_category_and_the_second_turn_the_first_answer(mt_bench, chatml):
    asked = []

    class Recording(HuggingFaceSampler):
        def sample(self, prompts, seed, decoding):
            sampled = super().sample(prompts, seed, decoding)
            asked.extend((prompt, decoding, answer) for prompt, answer in zip(prompts, sampled))
            return sampled

    answers(mt_bench, Recording(mt_bench, chatml))
    temperatures = {"writing": 0.7, "math": 0.0, "stem": 0.1, "coding": 0.0, "unheard of": 0.7}
    by_prompt = {tuple(prompt): (decoding, answer) for prompt, decoding, answer in asked}
    assert len(by_prompt) == len(asked) == 10
    for row in rows_of(mt_bench):
        first, second = (Message(**message) for message in row["messages"])
        for messages, answer in (
            ([first], row["answers"][0]),
            ([first, Message("assistant", row["answers"][0]["text"]), second], row["answers"][1]),
        ):
            decoding, sampled = by_prompt[tuple(chatml.encode_prompt(messages))]
            assert decoding.temperature == temperatures[row["category"]]
            assert answer == {**sampled._asdict(), "text": sampled.text.strip(), "tokens": len(sampled.ids)}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_three_processes_give_the_answers_of_one(mt_bench, tmp_path, monkeypatch, temperature):
    alone = dataclasses.replace(mt_bench, temperature=temperature, seed=3)
    together = dataclasses.replace(alone, output=str(tmp_path / "together"))
    answers(alone)
    manifests = []
    for rank in (2, 0, 1):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3}
        with monkeypatch.context() as launched:
            for name, value in place.items():
                launched.setenv(name, str(value))
            manifests.append(answers(together))
    assert manifests[:2] == [None, None]
    assert shards(together.output) == shards(alone.output) and len(shards(alone.output)) == 3
    assert manifests[2] == read_answers(alone.output).manifest
    other = dataclasses.replace(alone, output=str(tmp_path / "other"), seed=4)
    answers(other)
    assert (shards(other.output) == shards(alone.output)) == (temperature == 0.0)


def test_a_stopped_job_resumes_with_the_same_answers_and_asks_nothing_twice(mt_bench, chatml, tmp_path):
    class Stopping(HuggingFaceSampler):
        calls: list = []
        left = 5

        def sample(self, prompts, seed, decoding):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            self.calls.extend(map(tuple, prompts))
            return super().sample(prompts, seed, decoding)

    quiet = dataclasses.replace(mt_bench, output=str(tmp_path / "quiet"))
    answers(quiet)
    with pytest.raises(KeyboardInterrupt):
        answers(mt_bench, Stopping(mt_bench, chatml))
    done = shards(mt_bench.output)
    assert len(done) == 1
    with pytest.raises(UserError, match="the answers in .* are unfinished: rerun"):
        read_answers(mt_bench.output)
    Stopping.calls.clear()
    rest = Stopping(mt_bench, chatml)
    rest.left = 100
    answers(mt_bench, rest)
    assert shards(mt_bench.output) == shards(quiet.output)
    finished = [json.loads(line) for line in done["answers-00000.jsonl"].splitlines()]
    asked_before = [tuple(chatml.encode_prompt([Message(**row["messages"][0])])) for row in finished]
    assert not set(asked_before) & set(rest.calls)


def test_stop_tokens_and_stop_strings_end_an_answer(alpaca_eval, tmp_path):
    plain = dataclasses.replace(alpaca_eval, max_new_tokens=24, temperature=0.0)
    answers(plain)
    chosen = next(row for row in rows_of(plain) if len(set(row["answers"][0]["text"][4:])) > 2)
    text = chosen["answers"][0]["text"]
    stop = text[4:6]
    stopped = dataclasses.replace(plain, stop_strings=[stop], output=str(tmp_path / "stopped"))
    answers(stopped)
    (row,) = [row for row in rows_of(stopped) if row["prompt_id"] == chosen["prompt_id"]]
    (answer,) = row["answers"]
    assert answer["text"] == text[: text.index(stop)].strip() and answer["finished"]
    ids = chosen["answers"][0]["ids"]
    assert answer["ids"] == ids[: len(answer["ids"])] and len(answer["ids"]) < len(ids)
    tokenizer = load_tokenizer(plain.model)
    assert stop in tokenizer.decode(answer["ids"]) and stop not in tokenizer.decode(answer["ids"][:-1])


def test_an_answer_takes_the_positions_that_its_prompt_leaves(alpaca_eval, tiny_folder, tmp_path, chatml):
    folder = tmp_path / "short"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    lengths = [len(chatml.encode_prompt([Message("user", row["instruction"])])) for row in ALPACA_EVAL]
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": max(lengths) + 2}))
    short = dataclasses.replace(alpaca_eval, model=str(folder), max_new_tokens=64)
    answers(short)
    for row, length in zip(rows_of(short), lengths):
        (answer,) = row["answers"]
        room = max(lengths) + 2 - length
        assert answer["tokens"] == room or answer["finished"] and answer["tokens"] <= room
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": max(lengths)}))
    none_left = dataclasses.replace(short, output=str(tmp_path / "none"))
    with pytest.raises(UserError, match=f"has {max(lengths)} tokens: the model's {max(lengths)} positions leave no"):
        answers(none_left)
    assert not (tmp_path / "none").exists()


def test_an_answer_that_took_all_positions_leaves_none_for_the_next(mt_bench, tiny_folder, tmp_path, chatml):
    folder = tmp_path / "short"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    placeholder = [Message("user", "Begin 0."), Message("assistant", "x"), Message("user", "Go on with 0.")]
    positions = len(chatml.encode_prompt(placeholder)) + 1
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    answers(dataclasses.replace(mt_bench, model=str(folder), max_new_tokens=64, temperature=0.0))
    cut = [row["answers"] for row in rows_of(mt_bench) if row["answers"][0]["tokens"] > 8]
    assert cut
    assert all(last == {"text": "", "ids": [], "finished": False, "tokens": 0} for _, last in cut)


def test_a_server_answers_with_one_bos_and_the_stops(tokenizer_folders, tmp_path):
    """This tokenizer's template begins with a BOS, and a server that received text would prepend another."""
    folder = tokenizer_folders["headers"]
    tokenizer = load_tokenizer(folder)
    bos = tokenizer.encode_prompt([Message("user", "x")])[0]
    prompts = write_rows(tmp_path / "prompts.json", ALPACA_EVAL)
    section = evaluate_section(folder, prompts, tmp_path / "answers", "evaluate.engine=server")
    section = dataclasses.replace(section, stop_tokens=["<|start_header|>"], stop_strings=["END"])
    with serving(lambda asked: {"text": " It is so.\n", "finish_reason": "stop"}) as server:
        manifest = answers(dataclasses.replace(section, server=server.address))
    assert len(server.asked) == len(ALPACA_EVAL)
    for asked in server.asked:
        assert asked["prompt"].count(bos) == 1 and asked["prompt"][0] == bos
        assert asked["stop"] == ["END"] and asked["stop_token_ids"] == [tokenizer.special_id("<|start_header|>")]
        assert (asked["temperature"], asked["top_p"], asked["max_tokens"]) == (0.7, 1.0, 6)
    assert manifest["mean_tokens"] is None and manifest["truncated"] == 0
    answer = {"text": "It is so.", "ids": None, "finished": True, "tokens": None}
    assert [row["answers"] for row in rows_of(section)] == [[answer]] * len(ALPACA_EVAL)


@pytest.mark.parametrize(
    "choice, expected",
    [
        ({"finish_reason": "length", "token_ids": [10, 11]}, ([10, 11], False)),
        ({"finish_reason": "stop", "token_ids": [10, 11]}, ([10, 11, "end"], True)),
        ({"finish_reason": "stop", "token_ids": [10, 11, "end"]}, ([10, 11, "end"], True)),
        ({"finish_reason": "stop", "token_ids": [10, "stop"]}, ([10, "stop"], True)),
    ],
)
def test_ids_of_a_server_end_with_what_ended_them(choice, expected, alpaca_eval, chatml):
    named = {"end": chatml.end_of_turn, "stop": chatml.special_id("<|endoftext|>")}
    choice = choice | {"text": "x", "token_ids": [named.get(token, token) for token in choice["token_ids"]]}
    section = dataclasses.replace(alpaca_eval, engine="server", stop_tokens=["<|endoftext|>"])
    with serving(lambda asked: choice) as server:
        answers(dataclasses.replace(section, server=server.address))
    ids, finished = [named.get(token, token) for token in expected[0]], expected[1]
    for row in rows_of(section):
        assert (row["answers"][0]["ids"], row["answers"][0]["finished"]) == (ids, finished)
        words = chatml.decode([token for token in ids if token not in named.values()])
        assert row["answers"][0]["text"] == words.strip()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": -0.1}, "evaluate.temperature=-0.1 must not be negative"),
        ({"top_p": 0.0}, r"evaluate.top_p=0.0 must lie in \(0, 1\]"),
        ({"max_new_tokens": 0}, "evaluate.max_new_tokens=0 must be at least 1"),
        ({"stop_strings": [""]}, "holds an empty text"),
        ({"stop_tokens": ["<|eot_id|>"]}, "'<|eot_id|>' is not a special token of the tokenizer"),
        ({"batch_prompts": 0}, "evaluate.batch_prompts=0 must be at least 1"),
        ({"shard_prompts": 0}, "evaluate.shard_prompts=0 must be at least 1"),
        ({"preset": "llama2"}, "evaluate.preset is 'llama2'; choose one of auto, none, llama3"),
        ({"name": "a/b"}, "'a/b' cannot be that of a file; set evaluate.name"),
        ({"engine": "server"}, "evaluate.server has no value"),
        ({"prompts": "absent.json"}, "absent.json"),
        ({"benchmark": "arena_hard_v2"}, "it has no uid and no category and no prompt; it looks like one of alpaca"),
    ],
)
def test_refusals_write_nothing(alpaca_eval, change, message):
    before = contents(Path(alpaca_eval.output).parent)
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        answers(dataclasses.replace(alpaca_eval, **change))
    assert contents(Path(alpaca_eval.output).parent) == before


@pytest.mark.parametrize(
    "change, what", [({"seed": 1}, "seed"), ({"name": "other"}, "name"), ({"top_p": 0.5}, "settings")]
)
def test_the_output_of_another_run_is_refused(alpaca_eval, change, what):
    answers(alpaca_eval)
    before = contents(Path(alpaca_eval.output))
    with pytest.raises(UserError, match=f"holds answers with another {what}; name another evaluate.output"):
        answers(dataclasses.replace(alpaca_eval, **change))
    assert contents(Path(alpaca_eval.output)) == before


def test_a_folder_of_something_else_is_refused(alpaca_eval):
    Path(alpaca_eval.output).mkdir()
    (Path(alpaca_eval.output) / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and has no run.json; name another evaluate.output"):
        answers(alpaca_eval)


def test_answers_of_changed_weights_are_another_runs(alpaca_eval, tiny_folder, tmp_path):
    folder = tmp_path / "again"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    section = dataclasses.replace(alpaca_eval, model=str(folder))
    answers(section)
    weights = folder / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-5] ^= 1
    weights.write_bytes(bytes(changed))
    with pytest.raises(UserError, match="holds answers with another model"):
        answers(section)


@pytest.mark.parametrize(
    "visible, ranks, expected",
    [("", 2, ["0", "1"]), ("2, 5", 2, ["2", "5"]), ("GPU-a", 2, ["GPU-a"] * 2), ("4,5", 3, ["4", "5", "4"])],
)
def test_each_process_of_vllm_has_a_gpu_of_its_own(visible, ranks, expected):
    """Where Slurm binds one GPU to each task, it is the only one that is visible."""
    assert [own_gpu(visible, rank) for rank in range(ranks)] == expected
