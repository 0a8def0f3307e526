"""Files of AlpacaEval, Arena-Hard and MT-Bench: prompts as their tools give them, answers as they read them."""

import json
from pathlib import Path

import pytest

from tests.support.benchmarks import ALPACA_EVAL, ARENA_HARD_V1, ARENA_HARD_V2, MT_BENCH, evaluate_section, write_rows
from tests.support.completions import serving
from treg_megatron.errors import UserError
from treg_megatron.evaluation.answer_folder import read_answers
from treg_megatron.evaluation.answering.benchmarks import read_benchmark
from treg_megatron.evaluation.answering.job import answers
from treg_megatron.tokenizer.chat import load_tokenizer

BENCHMARKS = {
    "alpaca_eval": ALPACA_EVAL,
    "arena_hard_v0.1": ARENA_HARD_V1,
    "arena_hard_v2": ARENA_HARD_V2,
    "mt_bench": MT_BENCH,
}


@pytest.fixture
def answered(tokenizer_folders, tmp_path):
    """Answers the prompts of a benchmark by `Answer to` and the last words of the prompt; returns the output folder."""
    folder = tokenizer_folders["turns"]
    tokenizer = load_tokenizer(folder)

    def last_turn(asked: dict) -> dict:
        text = tokenizer.decode(asked["prompt"]).rpartition("<start_of_turn>user\n")[2].partition("<end_of_turn>")[0]
        return {"text": f"Réponse: {text}", "finish_reason": "stop"}

    def answer(benchmark: str, rows: list[dict], *overrides: str) -> Path:
        name = "prompts.json" if benchmark == "alpaca_eval" else "question.jsonl"
        prompts = write_rows(tmp_path / name, rows)
        output = tmp_path / f"answers {benchmark}"
        with serving(last_turn) as server:
            engine = (f"evaluate.benchmark={benchmark}", "evaluate.engine=server", f"evaluate.server={server.address}")
            answers(evaluate_section(folder, prompts, output, *engine, *overrides))
        return output

    return answer


def test_alpaca_eval_reads_one_list(answered):
    rows = [*ALPACA_EVAL[:2], {"instruction": "No dataset", "output": "a reference", "generator": "another"}]
    output = answered("alpaca_eval", rows)
    assert json.loads((output / "alpaca_eval.json").read_text(encoding="utf-8")) == [
        {
            **({"dataset": row["dataset"]} if "dataset" in row else {}),
            "instruction": row["instruction"],
            "output": f"Réponse: {row['instruction']}",
            "generator": "arm",
        }
        for row in rows
    ]
    assert json.loads((output / "manifest.json").read_text())["files"] == ["alpaca_eval.json"]


@pytest.mark.parametrize("benchmark", ["arena_hard_v0.1", "arena_hard_v2"])
def test_arena_hard_reads_a_line_an_answer(answered, benchmark):
    output = answered(benchmark, BENCHMARKS[benchmark])
    lines = (output / "model_answer" / "arm.jsonl").read_text(encoding="utf-8").splitlines()
    expected = sorted(BENCHMARKS[benchmark], key=lambda row: row["uid"])
    ids = set()
    for line, row in zip(lines, expected, strict=True):
        answer = json.loads(line)
        ids.add(answer.pop("ans_id"))
        assert isinstance(answer.pop("tstamp"), float)
        assert answer == {
            "uid": row["uid"],
            "model": "arm",
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": {"answer": f"Réponse: {row['prompt']}"}},
            ],
        }
    assert len(ids) == len(expected) and all(len(answer_id) == 22 for answer_id in ids)
    categories = {row["prompt_id"]: row["category"] for row in read_answers(output).rows}
    assert categories == {row["uid"]: row["category"] for row in expected}


def test_fastchat_reads_both_turns_of_each_question(answered):
    output = answered("mt_bench", MT_BENCH)
    lines = (output / "model_answer" / "arm.jsonl").read_text(encoding="utf-8").splitlines()
    expected = sorted(MT_BENCH, key=lambda row: row["question_id"])
    for line, row in zip(lines, expected, strict=True):
        answer = json.loads(line)
        assert len(answer.pop("answer_id")) == 22 and isinstance(answer.pop("tstamp"), float)
        assert answer == {
            "question_id": row["question_id"],
            "model_id": "arm",
            "choices": [{"index": 0, "turns": [f"Réponse: {turn}" for turn in row["turns"]]}],
        }


def test_other_prompts_have_no_file_and_keep_their_conversation(answered):
    conversation = [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Second?"},
    ]
    output = answered("prompts", [{"prompt_id": "a", "messages": conversation}, {"prompt_id": "b", "prompt": "Third?"}])
    first, second = read_answers(output).rows
    assert first["messages"] == conversation and second["messages"] == [{"role": "user", "content": "Third?"}]
    assert [[answer["text"] for answer in row["answers"]] for row in (first, second)] == [
        ["Réponse: Second?"],
        ["Réponse: Third?"],
    ]
    assert not [path for path in output.iterdir() if path.name.startswith(("alpaca", "model_answer"))]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_the_written_file_reads_as_the_folder(answered, tmp_path, benchmark):
    output = answered(benchmark, BENCHMARKS[benchmark])
    folder = read_answers(output)
    (name,) = folder.manifest["files"]
    if benchmark == "mt_bench":
        with pytest.raises(UserError, match="without their prompts: put its question.jsonl at "):
            read_answers(output / name)
        write_rows(output / "question.jsonl", MT_BENCH)
    file = read_answers(output / name)
    assert (file.name, file.benchmark, file.prompts_sha256) == ("arm", benchmark, folder.prompts_sha256)
    texts = [
        {row["prompt_id"]: [answer["text"] for answer in row["answers"]] for row in a.rows} for a in (file, folder)
    ]
    assert texts[0] == texts[1]
    assert (file.mean_characters, file.mean_tokens, file.truncated) == (folder.mean_characters, None, None)
    assert (file.settings, file.manifest, folder.truncated) == (None, None, 0)


def test_published_answers_of_arena_hard_read(tmp_path):
    """As arena-hard-auto stores them: further keys, and a system message in front."""
    row = {
        "uid": "0123456789abcdef",
        "ans_id": "x",
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Task"},
            {"role": "assistant", "content": {"answer": "Done", "thought": "hm"}},
        ],
        "tstamp": 1.5,
        "metadata": {"token_len": 1},
    }
    found = read_answers(write_rows(tmp_path / "m.jsonl", [row]))
    assert found.benchmark == "arena_hard_v2"
    assert found.rows[0]["messages"] == [{"role": "user", "content": "Task"}]
    assert found.rows[0]["answers"][0]["text"] == "Done"


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "holds no answers"),
        ([{"text": "x"}], "holds no answers of a form that can be read"),
        (["x"], "holds no answers of a form that can be read"),
        ([{"instruction": "a", "output": 1, "generator": "g"}], "row 1 is not an answer in the form of row 1"),
        ([{"instruction": "a", "output": "b"}], "row 1 is not an answer in the form of row 1: KeyError.'generator'"),
        (
            [{"instruction": "a", "output": "b", "generator": g} for g in ("g", "h")],
            "answers of several models .g, h.; name a file of one",
        ),
        ([{"instruction": "a", "output": "b", "generator": "g"}] * 2, "answers prompt [0-9a-f]{16} twice"),
    ],
)
def test_files_without_usable_answers(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_answers(write_rows(tmp_path / "answers.jsonl", rows))


def test_incomplete_folders_are_refused(answered):
    output = answered("alpaca_eval", ALPACA_EVAL)
    shard = output / "answers-00001.jsonl"
    shard.write_text(shard.read_text(encoding="utf-8").splitlines(keepends=True)[0], encoding="utf-8")
    with pytest.raises(UserError, match="does not hold the answers that its manifest lists"):
        read_answers(output)
    (output / "manifest.json").unlink()
    with pytest.raises(UserError, match="are unfinished: rerun the command"):
        read_answers(output)


# -- prompts


@pytest.mark.parametrize("asked", BENCHMARKS)
@pytest.mark.parametrize("given", BENCHMARKS)
def test_prompts_of_another_benchmark_are_refused_by_its_name(tmp_path, asked, given):
    path = str(write_rows(tmp_path / "prompts.jsonl", BENCHMARKS[given]))
    if asked == given:
        assert len(read_benchmark(path, asked)) == len(BENCHMARKS[given])
        return
    with pytest.raises(UserError, match=f"row 1 is not a prompt of {asked}: .* set evaluate.benchmark={given}$"):
        read_benchmark(path, asked)


@pytest.mark.parametrize(
    "benchmark, row, message",
    [
        ("alpaca_eval", {"instruction": " "}, "instruction must be text"),
        ("alpaca_eval", {"prompt": "x"}, "it has no instruction$"),
        ("alpaca_eval", ["x"], "it is not an object"),
        ("mt_bench", {**MT_BENCH[0], "turns": []}, "turns must be a list of texts"),
        ("mt_bench", {**MT_BENCH[0], "turns": ["a", 1]}, "turns must be a list of texts"),
        ("mt_bench", {**MT_BENCH[0], "question_id": "81"}, "question_id must be a number"),
        ("arena_hard_v2", {**ARENA_HARD_V2[0], "category": "poems"}, "its category is poems$"),
        ("arena_hard_v0.1", {**ARENA_HARD_V1[0], "prompt": 7}, "prompt must be text"),
        (
            "arena_hard_v0.1",
            {"question_id": "x", "category": "arena-hard-v0.1", "cluster": "C", "turns": [{"content": "x"}]},
            "of an old Arena-Hard: take question.jsonl of the present arena-hard-auto",
        ),
    ],
)
def test_rows_that_are_no_prompts(tmp_path, benchmark, row, message):
    with pytest.raises(UserError, match=f"row 1 is not a prompt of {benchmark}: .*{message}"):
        read_benchmark(str(write_rows(tmp_path / "prompts.jsonl", [row])), benchmark)


@pytest.mark.parametrize("benchmark", [*BENCHMARKS, "prompts"])
def test_no_prompts(tmp_path, benchmark):
    with pytest.raises(UserError, match="holds no prompts"):
        read_benchmark(str(write_rows(tmp_path / "prompts.json", [])), benchmark)


def test_a_prompt_that_comes_twice_is_refused(tmp_path):
    path = write_rows(tmp_path / "prompts.json", [*ALPACA_EVAL, ALPACA_EVAL[2]])
    with pytest.raises(UserError, match="row 8 repeats prompt [0-9a-f]{16}"):
        read_benchmark(str(path), "alpaca_eval")
