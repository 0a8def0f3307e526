"""Answers through SIGKILL: three processes are killed at random moments, again and again, and nothing is lost."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401 -- imported once, for all processes

from tests.support.benchmarks import evaluate_section, write_rows
from tests.support.completions import CompletionsServer
from treg_megatron.evaluation.answer_folder import read_answers
from treg_megatron.evaluation.answering.job import answers
from treg_megatron.sampling import huggingface  # noqa: F401 -- as above
from treg_megatron.tokenizer.chat import load_tokenizer
from treg_megatron.tokenizer.conversation import Message

KILLS, PROCESSES = 20, 3
QUESTIONS = [
    {"question_id": i, "category": ("writing", "math")[i % 2], "turns": [f"Begin {i}.", f"Go on with {i}."]}
    for i in range(160)  # more than the processes get through between twenty kills
]
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def section(tiny_folder, tmp_path):
    prompts = write_rows(tmp_path / "question.jsonl", QUESTIONS)
    overrides = ("evaluate.benchmark=mt_bench", "evaluate.shard_prompts=1")
    return evaluate_section(tiny_folder, prompts, tmp_path / "answers", *overrides)


def start(section, rank: int = 0, processes: int = PROCESSES):
    """A process of several that answers its share."""

    def run():
        torch.set_num_threads(1)  # a forked process has none of the threads of its parent's pool
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({name: str(value) for name, value in place.items()})
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            answers(section)

    process = FORK.Process(target=run)
    process.start()
    return process


def storm(section) -> int:
    """Kill all processes and start them again, until none is killed; number of kills of an unfinished job.

    Two kills of three come at a random moment after the start, the others when the job has just got further.
    """
    moments, kills, manifest = random.Random(0), 0, Path(section.output) / "manifest.json"
    while True:
        left_alone = kills == KILLS or manifest.exists()
        processes, before = [start(section, rank) for rank in range(PROCESSES)], len(shards(section))
        if not left_alone:
            time.sleep(moments.uniform(0, 0.2))
            while kills % 3 == 2 and len(shards(section)) == before and any(p.is_alive() for p in processes):
                time.sleep(0.002)
            kills += any(p.is_alive() for p in processes) and not manifest.exists()
            for process in processes:
                process.kill()
        for process in processes:
            process.join(120)
        assert {process.exitcode for process in processes} <= {0, -signal.SIGKILL}
        if left_alone:
            return kills


def shards(section) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(section.output).glob("answers-*.jsonl"))}


def test_twenty_kills_change_no_answer(section, tmp_path):
    quiet = dataclasses.replace(section, output=str(tmp_path / "quiet"))
    alone = start(quiet, processes=1)
    alone.join(120)
    assert storm(section) == KILLS
    assert shards(section) == shards(quiet)
    asked = Counter(row["prompt_id"] for row in read_answers(section.output).rows)
    assert asked == Counter(str(row["question_id"]) for row in QUESTIONS)
    assert read_answers(section.output).manifest == read_answers(quiet.output).manifest
    left = [path.name for path in Path(section.output).iterdir() if path.name.startswith(".")]
    assert left == []


def test_a_killed_job_asks_a_server_for_no_finished_answer_again(section, tmp_path):
    """The server notes which shards were finished when it was asked for a prompt of them."""
    log = tmp_path / "asked.jsonl"

    def answer(asked):
        time.sleep(0.02)
        finished = sorted(shards(section))
        with log.open("a") as file:
            file.write(json.dumps([asked["prompt"], finished]) + "\n")
        return {"text": "so", "finish_reason": "stop"}

    server = CompletionsServer(answer)
    serving = FORK.Process(target=server.serve_forever, daemon=True)
    serving.start()
    server.server_close()
    try:
        served = dataclasses.replace(section, engine="server", server=server.address)
        assert storm(served) == KILLS
    finally:
        serving.kill()
        serving.join()
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    by_prompt: dict[tuple, list] = {}
    for prompt, finished in requests:
        by_prompt.setdefault(tuple(prompt), []).append(finished)
    assert len(by_prompt) == 2 * len(QUESTIONS)
    assert len(requests) > len(by_prompt)  # kills did hit answers that were under way
    rows = read_answers(served.output).rows
    tokenizer = load_tokenizer(served.model)
    for number, row in enumerate(rows):
        first = tuple(tokenizer.encode_prompt([Message(**row["messages"][0])]))
        for finished in by_prompt[first]:
            assert f"answers-{number:05d}.jsonl" not in finished
