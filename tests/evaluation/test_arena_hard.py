"""Judging by Arena-Hard's prompt against arena-hard-auto itself, where TREG_ARENA_HARD names a checkout of it.

The Python of `make test-eval` then needs its requirements, too: boto3, shortuuid and requests.
"""

import dataclasses
import json
import os
import random
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support.judging_server import judging_server
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.evaluation.answer_folder import FORMAT, VERSION, prompts_hash, read_answers
from treg_megatron.evaluation.judge import judge
from treg_megatron.evaluation.judges.elsewhere import commands
from treg_megatron.utils.files import write_manifest

CHECKOUT = os.environ.get("TREG_ARENA_HARD")


@pytest.mark.skipif(not CHECKOUT, reason="TREG_ARENA_HARD names no checkout of lmarena/arena-hard-auto")
@pytest.mark.parametrize(
    "benchmark, folder", [("arena_hard_v0.1", "arena-hard-v0.1"), ("arena_hard_v2", "arena-hard-v2.0")]
)
def test_requests_and_judgments_are_those_of_arena_hard_auto(benchmark, folder, tmp_path, alpaca_eval_python):
    checkout = Path(str(CHECKOUT)).resolve()
    questions = random.Random(1).sample(lines_of(checkout / "data" / folder / "question.jsonl"), 8)
    names = {"arm": "my-arm", "baseline": "my base"}
    sides = {side: answers(tmp_path / side, name, questions, benchmark) for side, name in names.items()}
    overrides = {**sides, "output": tmp_path / "judged", "cache": tmp_path / "cache", "model": "judge"}
    settings = section(load_recipe(overrides=[f"judge.{key}={value}" for key, value in overrides.items()]), "judge")
    with judging_server() as server:
        judge(dataclasses.replace(settings, kind="arena_hard", server=server.address))
        asked = sorted(json.dumps(body, sort_keys=True) for body in server.asked)
        server.asked.clear()
        copy = f"cp -r {shlex.quote(str(checkout))} arena-hard-auto"
        script = commands(dataclasses.replace(settings, kind="files")).partition("treg compare")[0]
        script = script.replace("git clone https://github.com/lmarena/arena-hard-auto", copy)
        environment = {
            **os.environ,
            "PATH": f"{Path(alpaca_eval_python).parent}:{os.environ['PATH']}",
            "OPENAI_API_KEY": "x",
            "OPENAI_BASE_URL": server.address,
        }
        done = subprocess.run(["sh", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert sorted(json.dumps(body, sort_keys=True) for body in server.asked) == asked
        assert len(asked) == 16
    theirs = tmp_path / "arena-hard-auto" / "data" / folder / "model_judgment" / "judge" / "my-arm.jsonl"
    ours = tmp_path / "judged" / "model_judgment" / "judge" / "my-arm.jsonl"
    by_uid = [{line["uid"]: line for line in lines_of(path)} for path in (ours, theirs)]
    assert by_uid[0] == by_uid[1] and len(by_uid[0]) == 8


def lines_of(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="\n") as lines:  # texts may hold what splitlines() splits at
        return [json.loads(line) for line in lines]


def answers(folder: Path, name: str, questions: list[dict], benchmark: str) -> Path:
    """A folder as treg answers writes it, with the file that arena-hard-auto reads."""
    chance = random.Random(name)
    (folder / "model_answer").mkdir(parents=True)
    file = folder / "model_answer" / f"{name}.jsonl"
    with open(file, "w") as stream:
        for question in questions:
            asked = {"role": "user", "content": question["prompt"]}
            answer = {"role": "assistant", "content": {"answer": name + " word" * chance.randrange(20)}}
            line = {"uid": question["uid"], "ans_id": "x", "model": name, "messages": [asked, answer], "tstamp": 0}
            stream.write(json.dumps({**line, "metadata": {}}) + "\n")
    categories = {question["uid"]: question["category"] for question in questions}
    rows = [{**row, "category": categories[row["prompt_id"]]} for row in read_answers(file).rows]
    (folder / "answers-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "name": name,
        "benchmark": benchmark,
        "prompts": len(rows),
        "prompts_sha256": prompts_hash(rows),
        "settings": {},
        "shards": ["answers-00000.jsonl"],
        "files": [f"model_answer/{name}.jsonl"],
    }
    write_manifest(folder / "manifest.json", FORMAT, VERSION, content)
    return folder
