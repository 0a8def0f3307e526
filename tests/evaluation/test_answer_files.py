"""The benchmarks' own loaders read the answer files that `treg answers` writes.

alpaca_eval is the installed package; arena-hard-auto and FastChat are checkouts that TREG_ARENA_HARD and TREG_FASTCHAT
name, whose loaders run alone, without what else their modules import.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.benchmarks import ALPACA_EVAL, ARENA_HARD_V2, MT_BENCH, evaluate_section, write_rows
from tests.support.completions import serving
from tests.support.tiny import tiny_tokenizer
from treg_megatron.evaluation.answering.job import answers

PYTHON = os.environ.get("TREG_ALPACA_EVAL_PYTHON")
ARENA_HARD, FASTCHAT = (Path(os.environ.get(name, "/absent")) for name in ("TREG_ARENA_HARD", "TREG_FASTCHAT"))


@pytest.fixture
def answered(tmp_path):
    """Answers the prompts of a benchmark; returns the output folder."""
    tiny_tokenizer(tmp_path / "model", template="headers")

    def answer(benchmark: str, rows: list[dict]) -> Path:
        prompts = write_rows(tmp_path / "prompts.json", rows)
        engine = (f"evaluate.benchmark={benchmark}", "evaluate.engine=server")
        with serving(lambda asked: {"text": f"Réponse {len(asked['prompt'])}", "finish_reason": "stop"}) as server:
            section = evaluate_section(tmp_path / "model", prompts, tmp_path / "answers", *engine)
            section.server = server.address
            answers(section)
        return tmp_path / "answers"

    return answer


def functions(module: Path, *names: str) -> dict[str, Any]:
    """Some functions of a module, with what it imports of the standard library alone."""
    found: dict[str, Any] = {}
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        of_library = isinstance(node, ast.Import | ast.ImportFrom) and all(
            name.split(".")[0] in sys.stdlib_module_names
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        )
        if of_library or isinstance(node, ast.FunctionDef) and node.name in names:
            exec(compile(ast.Module([node], []), str(module), "exec"), found)
    return found


@pytest.mark.skipif(not PYTHON, reason="TREG_ALPACA_EVAL_PYTHON names no Python (make test-eval)")
def test_alpaca_eval_loads_the_answers(answered):
    output = answered("alpaca_eval", ALPACA_EVAL)
    load = (
        "import sys; from alpaca_eval.utils import load_or_convert_to_dataframe as load; "
        "print(load(sys.argv[1]).to_json(orient='records'))"
    )
    done = subprocess.run([PYTHON, "-c", load, output / "alpaca_eval.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert [(row["instruction"], row["dataset"], row["generator"]) for row in loaded] == [
        (row["instruction"], row["dataset"], "arm") for row in ALPACA_EVAL
    ]
    assert all(row["output"].startswith("Réponse ") for row in loaded)


@pytest.mark.skipif(not ARENA_HARD.is_dir(), reason="TREG_ARENA_HARD names no checkout of lmarena/arena-hard-auto")
def test_arena_hard_auto_loads_the_answers(answered):
    output = answered("arena_hard_v2", ARENA_HARD_V2)
    loader = functions(ARENA_HARD / "utils" / "completion.py", "load_model_answers")["load_model_answers"]
    loaded = loader(str(output / "model_answer"))
    assert set(loaded) == {"arm"} and set(loaded["arm"]) == {row["uid"] for row in ARENA_HARD_V2}
    for answer in loaded["arm"].values():  # as gen_judgment.py reads it
        assert answer["model"] == "arm" and answer["messages"][-1]["content"]["answer"].startswith("Réponse ")


@pytest.mark.skipif(not FASTCHAT.is_dir(), reason="TREG_FASTCHAT names no checkout of lm-sys/FastChat")
def test_fastchat_loads_the_answers(answered):
    output = answered("mt_bench", MT_BENCH)
    common = functions(FASTCHAT / "fastchat" / "llm_judge" / "common.py", "load_model_answers", "check_data")
    loaded = common["load_model_answers"](str(output / "model_answer"))
    common["check_data"](MT_BENCH, loaded, {}, ["arm"], {})
    for question in MT_BENCH:  # as run_judge_single reads it
        assert len(loaded["arm"][question["question_id"]]["choices"][0]["turns"]) == len(question["turns"])
