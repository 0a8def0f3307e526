"""Judging: which verdicts become which preferences, what is asked twice, and what is refused."""

import dataclasses
import json
import subprocess
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.judging_server import alpaca_eval_file, completion, judging_server, shown, verdict
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.config.schema import JudgeSection
from treg_megatron.errors import UserError
from treg_megatron.evaluation.judge import judge
from treg_megatron.evaluation.judges import reply_cache
from treg_megatron.evaluation.judges.alpaca_eval import PACKAGE, read_annotation
from treg_megatron.evaluation.judges.arena_hard import VERDICTS, read_prompts, read_verdict
from treg_megatron.evaluation.judges.chat import ChatServer
from treg_megatron.evaluation.judges.chat_proxy import ChatProxy
from treg_megatron.evaluation.judges.elsewhere import commands
from treg_megatron.evaluation.judges.reply_cache import ReplyCache
from treg_megatron.evaluation.judgment_folder import read_judgments
from treg_megatron.utils import http

pytestmark = pytest.mark.slow

ARM, BASELINE = [3, 9, 5, 0, 1], [5, 4, 5, 30, 1]  # words of each answer


@pytest.fixture
def server():
    with judging_server() as running:
        yield running


@pytest.fixture
def settings(server, tmp_path, monkeypatch) -> JudgeSection:
    """Five prompts, to be judged by the server with Arena-Hard's prompt."""
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.001)
    for name, words in (("arm", ARM), ("base", BASELINE)):
        (tmp_path / f"{name}.json").write_text(json.dumps(alpaca_eval_file(name, words)))
    overrides = {
        "arm": tmp_path / "arm.json",
        "baseline": tmp_path / "base.json",
        "output": tmp_path / "judged",
        "cache": tmp_path / "cache",
        "kind": "arena_hard",
        "server": server.address,
        "model": "judge",
        "shard_prompts": 2,
        "concurrency": 4,
        "max_attempts": 3,
    }
    return section(load_recipe(overrides=[f"judge.{key}={value}" for key, value in overrides.items()]), "judge")


def by_length(messages, responses):
    assert messages[-1]["role"] == "user"
    return [len(response) for response in responses]


def by_nothing(messages, responses):
    return [float("nan") for _ in responses]


def write_shards(
    folder: Path, name: str, answers: list[list[str]], benchmark: str, category: str | None = None
) -> Path:
    """A folder as treg answers writes it."""
    from treg_megatron.evaluation.answer_folder import FORMAT, VERSION, prompts_hash
    from treg_megatron.utils.files import write_manifest

    rows = [
        {
            "prompt_id": f"q{number}",
            "messages": [{"role": "user", "content": f"Turn {turn} of {number}"} for turn in range(len(texts))],
            "answers": [{"text": text, "ids": [1, 2], "finished": True, "tokens": 2} for text in texts],
            "category": category,
            "dataset": None,
        }
        for number, texts in enumerate(answers)
    ]
    folder.mkdir()
    (folder / "answers-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "name": name,
        "benchmark": benchmark,
        "prompts": len(rows),
        "prompts_sha256": prompts_hash(rows),
        "settings": {"temperature": 0.7},
        "shards": ["answers-00000.jsonl"],
        "files": [f"model_answer/{name}.jsonl"],
    }
    write_manifest(folder / "manifest.json", FORMAT, VERSION, content)
    return folder


# -- Arena-Hard's prompt


def test_both_orders_are_asked_and_the_arm_gets_its_share(settings, server):
    manifest = judge(settings)
    assert (manifest["judged"], manifest["failed"], len(server.asked)) == (5, 0, 10)
    judgments = read_judgments(settings.output)
    assert [row["preference"] for row in judgments.rows] == [0.0, 1.0, 0.0, 0.0, 0.0]
    for row, arm, baseline in zip(
        judgments.rows, alpaca_eval_file("arm", ARM), alpaca_eval_file("base", BASELINE), strict=True
    ):
        assert [order["arm_first"] for order in row["orders"]] == [False, True]
        assert row["orders"][0]["verdict"] == verdict(baseline["output"], arm["output"])
        assert row["orders"][1]["verdict"] == verdict(arm["output"], baseline["output"])
    first = next(request for request in server.asked if shown(request)[0].startswith("base0"))
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("judge", 0.0, 4096)
    assert first["messages"][0]["content"].startswith("Please act as an impartial judge")
    assert first["messages"][1]["content"].startswith("<|User Prompt|>\nExplain thing 0 in a few words.\n\n")


def test_significantly_better_counts_three_times(settings, server):
    def the_first_wins(request):
        reply = completion(request)
        found = "A>>B" if shown(request)[0].startswith("arm") else "A>B"
        reply["choices"][0]["message"]["content"] = f"[[{found}]]"
        return 200, reply

    server.answer = the_first_wins  # three for the arm, one for the baseline
    judge(settings)
    assert {row["preference"] for row in read_judgments(settings.output).rows} == {0.75}


@pytest.mark.parametrize(
    "text, found",
    [
        ("So [[A>B]] at first, but my final verdict is [[B>>A]].", "B>>A"),
        ("[[a=b]]", "A=B"),
        ("final: [B>A]", "B>A"),
        ("[[A]]", None),
        ("[[A>B>A]]", None),
        ("A>B", None),
        ("", None),
    ],
)
def test_reading_a_verdict(text, found):
    assert read_verdict(text, read_prompts()["verdict_patterns"]) == found


def test_a_verdict_and_its_mirror_image_add_up():
    for text, (score, weight) in VERDICTS.items():
        mirrored = text.translate(str.maketrans("AB", "BA"))
        assert VERDICTS[mirrored] == (1 - score, weight)


def test_a_reply_without_a_verdict_is_asked_for_again_and_never_made_up(settings, server):
    seen = Counter()

    def hesitant(request):
        reply = completion(request)
        first, second = shown(request)
        seen[first, second] += 1
        silent = first.startswith(("arm0", "base1")) and (first.startswith("arm0") or seen[first, second] < 3)
        if silent:
            reply["choices"][0]["message"]["content"] = "Both have their merits."
        return 200, reply

    server.answer = hesitant
    manifest = judge(settings)
    assert (manifest["judged"], manifest["failed"]) == (4, 1)
    rows = read_judgments(settings.output).rows
    assert rows[0]["preference"] is None and rows[0]["orders"][1]["verdict"] == ""
    assert rows[0]["orders"][1]["reply"] == "Both have their merits."
    assert rows[1]["preference"] == 1.0 and len(server.asked) == 10 + 2 + 2
    games = model_judgment(settings)[0]["games"]
    assert games[0]["score"] is not None and games[1]["score"] is None


def test_a_request_that_the_server_turns_down_is_a_failure_of_that_pair(settings, server):
    def strict(request):
        if shown(request)[0].startswith("arm2"):
            return 400, {"error": {"message": "against our rules"}}
        return 200, completion(request)

    server.answer = strict
    assert judge(settings)["failed"] == 1
    assert "against our rules" in read_judgments(settings.output).rows[2]["orders"][1]["reply"]


def test_a_judge_that_gives_no_verdict_at_all_stops_the_job(settings, server):
    server.answer = lambda request: (400, {"error": {"message": "no such model"}})
    with pytest.raises(UserError, match="no verdict on any of the first 2 prompts; to .* it said: .*no such model"):
        judge(settings)
    assert not list(Path(settings.output).glob("judgments-*"))


def test_a_shard_without_a_verdict_is_no_reason_to_stop_a_judge_that_gave_some(settings, server):
    def strict(request):
        if shown(request)[0].startswith(("arm2", "arm3")):
            return 200, {"error": {"message": "against our rules"}}
        return 200, completion(request)

    server.answer = strict
    assert judge(settings)["failed"] == 2
    assert "against our rules" in read_judgments(settings.output).rows[3]["orders"][1]["reply"]


def test_a_wrong_key_stops_the_job(settings, server):
    server.answer = lambda request: (401, {"error": {"message": "who are you"}})
    with pytest.raises(UserError, match="returned status 401: .*who are you"):
        judge(settings)


def test_the_file_that_arena_hard_reads(settings):
    judge(dataclasses.replace(settings, model="org/judge"))
    lines = model_judgment(settings, "org--judge")
    rows = read_judgments(settings.output).rows
    assert [line["uid"] for line in lines] == [row["prompt_id"] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        assert (line["model"], line["baseline"], line["judge"]) == ("arm", "base", "org/judge")
        assert line["category"] == "arena-hard-v0.1"
        assert [game["score"] for game in line["games"]] == [order["verdict"] for order in row["orders"]]
        assert "base" in line["games"][0]["prompt"][1]["content"].partition("<|The End of Assistant A")[0]


def model_judgment(settings, judge_name="judge"):
    path = Path(settings.output) / "model_judgment" / judge_name / "arm.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_creative_writing_has_a_prompt_of_its_own(settings, server, tmp_path):
    def folders(category):
        return [
            str(write_shards(tmp_path / f"{name} {category}", name, [[text], [text]], "arena_hard_v2", category))
            for name, text in (("arm", "longer"), ("base", "short"))
        ]

    for category, own_answer in (("math", True), ("creative_writing", False)):
        arm, baseline = folders(category)
        judge(dataclasses.replace(settings, arm=arm, baseline=baseline, output=str(tmp_path / f"out {category}")))
        system = server.asked[-1]["messages"][0]["content"]
        assert ("generating your own answer" in system) == own_answer and server.asked[-1]["max_tokens"] == 16000
    arm, baseline = folders("poetry")
    with pytest.raises(UserError, match="prompt q0 has the category poetry"):
        judge(dataclasses.replace(settings, arm=arm, baseline=baseline, output=str(tmp_path / "out")))


# -- nothing is paid for twice


def test_a_finished_folder_and_a_deleted_one_cost_nothing(settings, server, tmp_path):
    judge(settings)
    judge(settings)
    first = read_judgments(settings.output).rows
    judge(dataclasses.replace(settings, output=str(tmp_path / "again")))
    assert len(server.asked) == 10 and read_judgments(tmp_path / "again").rows == first


def test_another_setting_of_the_judge_is_another_request(settings, server, tmp_path):
    judge(settings)
    for change in ({"temperature": 0.5}, {"model": "other"}, {"max_tokens": 7}):
        before = len(server.asked)
        judge(dataclasses.replace(settings, output=str(tmp_path / str(change)), **change))
        assert len(server.asked) == before + 10


def test_a_server_that_goes_down_stops_the_job_which_can_resume(settings, server):
    served = []

    def goes_down(request):
        if len(served) == 6:
            return 503, {}
        served.append(request)
        return 200, completion(request)

    server.answer = goes_down
    with pytest.raises(UserError, match="gave no answer in 3 attempts .*the replies so far are kept"):
        judge(settings)
    server.answer = lambda request: (200, (served.append(request), completion(request))[1])
    assert judge(settings)["judged"] == 5
    assert len(served) == 10 and Counter(map(json.dumps, served)).most_common(1)[0][1] == 1


def test_an_unfinished_line_is_cut_off_and_a_damaged_one_named(settings, server, tmp_path):
    judge(settings)
    file = tmp_path / "cache" / "replies-00000.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    judge(dataclasses.replace(settings, output=str(tmp_path / "again")))
    assert len(server.asked) == 11
    assert [json.loads(line)["attempt"] for line in file.read_text().splitlines()] == [0] * 10
    file.write_bytes(whole.replace(b'{"key"', b'{"kex"', 1))
    with pytest.raises(UserError, match=r"replies-00000.jsonl line 1 is damaged; delete that line"):
        judge(dataclasses.replace(settings, output=str(tmp_path / "third")))


def test_two_processes_write_files_of_their_own_and_read_each_others(tmp_path):
    with ReplyCache(tmp_path / "cache") as one, ReplyCache(tmp_path / "cache") as two:
        one.add("a", {}, 0, {"from": "one"})
        two.add("b", {}, 0, {"from": "two"})
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "replies-00000.jsonl",
        "replies-00001.jsonl",
    ]
    with ReplyCache(tmp_path / "cache") as third:
        assert third.find("a") == {"from": "one"} and third.find("b") == {"from": "two"} and len(third) == 2


def test_a_reply_counts_when_it_is_on_disk(tmp_path, monkeypatch):
    file, real, seen = tmp_path / "cache" / "replies-00000.jsonl", reply_cache.os.fsync, []

    def fsync(handle):
        seen.append((file.read_text().count("\n"), cache.find("a")))
        real(handle)

    with ReplyCache(tmp_path / "cache") as cache:
        monkeypatch.setattr(reply_cache.os, "fsync", fsync)
        cache.add("a", {}, 0, {"n": 1})
        assert seen == [(1, None)] and cache.find("a") == {"n": 1}


def test_a_reply_that_cannot_be_written_leaves_a_sound_file(tmp_path, monkeypatch):
    with ReplyCache(tmp_path / "cache") as cache:
        cache.add("a", {}, 0, {"n": 1})

        def disk_full(handle, content):
            reply_cache.os.write(handle, content[:5])
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(reply_cache, "_write_whole", disk_full)
            with pytest.raises(UserError, match="cannot write .*replies-00000.jsonl: No space left"):
                cache.add("b", {}, 0, {"n": 2})
        assert cache.find("b") is None
        cache.add("c", {}, 0, {"n": 3})
    with ReplyCache(tmp_path / "cache") as cache:
        assert len(cache) == 2


def test_the_same_request_at_the_same_time_is_asked_once(settings, server):
    server.pause = 0.2
    request = {"model": "judge", "messages": [{"role": "user", "content": "?"}]}
    server.answer = lambda request: (200, {"choices": [{"message": {"content": "x"}}]})
    with ChatServer(settings) as chat, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: chat.reply(request, 0), range(8)))
        assert len(server.asked) == 1 and all(reply == replies[0] for reply in replies)
        chat.reply(request, 1)
    assert len(server.asked) == 2


def test_the_proxy_serves_its_own_process_alone(settings, server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.answer = lambda request: (200, {"choices": [{"message": {"content": "x"}}]})
    with ChatServer(dataclasses.replace(settings, api_key_env="JUDGE_KEY")) as chat, ChatProxy(chat) as proxy:

        def ask(token, path=""):
            address = path or f"{proxy.address(0)}/chat/completions"
            headers = {"Authorization": f"Bearer {token}"}
            with urllib.request.urlopen(urllib.request.Request(address, b'{"model": "judge"}', headers)) as answer:
                return json.load(answer)

        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask("secret")
        assert ask(proxy.token)["choices"][0]["message"]["content"] == "x"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask(proxy.token, f"{proxy.address(0)}/models")
        assert server.keys == ["Bearer secret"] and proxy.failure is None
        server.answer = lambda request: (401, {})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask(proxy.token, f"{proxy.address(1)}/chat/completions")
        assert "status 401" in str(proxy.failure)


def test_no_key_is_written(settings, server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "a-secret-of-ours")
    judge(dataclasses.replace(settings, api_key_env="JUDGE_KEY"))
    assert set(server.keys) == {"Bearer a-secret-of-ours"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(b"a-secret-of-ours" in path.read_bytes() for path in files)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(UserError, match="JUDGE_KEY, which is not set"):
        judge(dataclasses.replace(settings, api_key_env="JUDGE_KEY", output=str(tmp_path / "again")))


# -- scores


def test_a_function_judges_by_its_scores(settings, server):
    by_function = dataclasses.replace(settings, kind="function", function="tests.unit.test_judging:by_length")
    manifest = judge(by_function)
    assert manifest["judge"] == {"kind": "function", "name": "tests.unit.test_judging:by_length"}
    rows = read_judgments(settings.output).rows
    for row, arm, baseline in zip(rows, alpaca_eval_file("arm", ARM), alpaca_eval_file("base", BASELINE), strict=True):
        assert (row["arm_score"], row["baseline_score"]) == (len(arm["output"]), len(baseline["output"]))
        assert row["preference"] == (len(arm["output"]) > len(baseline["output"])) and row["orders"] == []
    assert server.asked == []


def test_equal_scores_are_a_tie_and_turns_are_scored_with_what_went_before(settings, tmp_path):
    arm = write_shards(tmp_path / "a", "arm", [["four", "four"], ["one", "fifteen"]], "mt_bench")
    baseline = write_shards(tmp_path / "b", "base", [["five!", "six"], ["one", "fifteen words"]], "mt_bench")
    by_function = dataclasses.replace(
        settings, arm=str(arm), baseline=str(baseline), kind="function", function="tests.unit.test_judging:by_history"
    )
    judge(by_function)
    rows = read_judgments(settings.output).rows
    # the mean over turns of the characters in the answer and all answers before it
    assert [row["arm_score"] for row in rows] == [(4 + 8) / 2, (3 + 10) / 2]
    assert [row["baseline_score"] for row in rows] == [(5 + 8) / 2, (3 + 16) / 2]
    assert [row["preference"] for row in rows] == [0.0, 0.0]
    side = read_judgments(settings.output).arm
    assert (side["mean_tokens"], side["truncated"], side["settings"]) == (2.0, 0, {"temperature": 0.7})
    same = dataclasses.replace(by_function, baseline=str(arm), output=str(tmp_path / "same"))
    judge(same)
    assert {row["preference"] for row in read_judgments(same.output).rows} == {0.5}


def by_history(messages, responses):
    before = sum(len(message["content"]) for message in messages if message["role"] == "assistant")
    return [before + len(response) for response in responses]


# -- what is refused


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": None}, "judge.kind is arena_hard, but judge.model has no value"),
        ({"kind": "reward_model"}, "judge.kind is reward_model, but judge.reward_model has no value"),
        ({"kind": "function"}, "judge.kind is function, but judge.function has no value"),
        ({"kind": "function", "function": "json:nothing"}, "judge.function=json:nothing cannot be imported"),
        ({"kind": "function", "function": "tests.unit.test_judging:by_nothing"}, "each needs one finite score"),
        (
            {"kind": "alpaca_eval", "alpaca_eval_python": "/no/python"},
            "alpaca_eval_python=/no/python cannot be started",
        ),
        ({"concurrency": 0}, "judge.concurrency=0 must be at least 1"),
        ({"arm": "absent.json"}, "absent.json"),
    ],
)
def test_unusable_settings_are_refused(settings, change, message):
    with pytest.raises(UserError, match=message):
        judge(dataclasses.replace(settings, **change))
    assert not list(Path(settings.output).glob("judgments-*"))


def test_a_python_without_alpaca_eval_is_told_what_to_install(settings, tmp_path):
    empty = tmp_path / "python"
    empty.write_text("#!/bin/sh\nexit 1\n")
    empty.chmod(0o755)
    with pytest.raises(UserError, match="alpaca_eval is not installed for .*pip install alpaca-eval==0.6.6"):
        judge(dataclasses.replace(settings, kind="alpaca_eval", alpaca_eval_python=str(empty)))


def test_one_release_of_alpaca_eval_is_named_everywhere():
    root = Path(__file__).resolve().parents[2]
    for name in ("setup.py", "Makefile"):
        assert PACKAGE in (root / name).read_text(), name


def test_other_prompts_are_named(settings, server, tmp_path):
    rows = alpaca_eval_file("base", BASELINE)
    rows[1]["instruction"] = "Something else."
    (tmp_path / "base.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"base.json lacks answers to 1 prompts .*, such as [0-9a-f]{16}: both must"):
        judge(settings)
    (tmp_path / "base.json").write_text(json.dumps(alpaca_eval_file("base", BASELINE + [1])))
    with pytest.raises(UserError, match=r"arm.json lacks answers to 1 prompts"):
        judge(settings)
    arm, baseline = (write_shards(tmp_path / name, name, [["x"], ["y"]], "prompts") for name in ("arm", "other"))
    shard = baseline / "answers-00000.jsonl"
    shard.write_text(shard.read_text().replace("of 1", "of one"))
    manifest = json.loads((baseline / "manifest.json").read_text())
    from treg_megatron.evaluation.answer_folder import prompts_hash

    manifest["prompts_sha256"] = prompts_hash([json.loads(line) for line in shard.read_text().splitlines()])
    (baseline / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"other texts for 1 prompts of the same id, such as q1"):
        judge(dataclasses.replace(settings, arm=str(arm), baseline=str(baseline)))
    assert server.asked == []


def test_prompts_of_several_messages_are_refused_before_anything_is_asked(settings, server, tmp_path):
    answers = [["x"], ["y"], ["z", "z"]]
    arm, baseline = (write_shards(tmp_path / name, name, answers, "mt_bench") for name in ("arm", "other"))
    with pytest.raises(UserError, match="prompt q2 has 2 messages, and this judge reads single messages"):
        judge(dataclasses.replace(settings, arm=str(arm), baseline=str(baseline)))
    assert server.asked == []


def test_a_folder_takes_only_the_run_that_it_was_begun_with(settings, server, tmp_path):
    judge(settings)
    for change in ({"temperature": 0.1}, {"model": "other"}, {"verdict_attempts": 1}):
        with pytest.raises(UserError, match="judged holds judgments with another judge; name another judge.output"):
            judge(dataclasses.replace(settings, **change))
    (tmp_path / "arm.json").write_text(json.dumps(alpaca_eval_file("arm", ARM[::-1])))
    with pytest.raises(UserError, match="holds judgments with another arm"):
        judge(settings)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(UserError, match="is not empty and has no run.json"):
        judge(dataclasses.replace(settings, output=str(tmp_path / "full")))
    assert len(server.asked) == 10


def test_an_incomplete_folder_is_not_read(settings):
    judge(settings)
    shard = Path(settings.output) / "judgments-00001.jsonl"
    shard.write_text(shard.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="holds 4 judgments of 5 prompts"):
        read_judgments(settings.output)
    shard.unlink()
    with pytest.raises(UserError, match="judgments-00001.jsonl does not exist"):
        read_judgments(settings.output)


# -- alpaca_eval's annotations, and commands for elsewhere


@pytest.mark.parametrize(
    "value, arm_is_output_2, preference", [(2, True, 1.0), (1, True, 0.0), (1.25, True, 0.25), (1.25, False, 0.75)]
)
def test_reading_an_annotation(value, arm_is_output_2, preference):
    for switched in (False, True):
        read = read_annotation({"preference": value, "preference_raw_completion": "m"}, switched, arm_is_output_2)
        assert read["preference"] == preference and read["verdict"] == "m"
        assert read["arm_first"] == (arm_is_output_2 if switched else not arm_is_output_2)
    assert read_annotation({"preference": None}, False, arm_is_output_2)["preference"] is None


def test_the_commands_for_elsewhere(settings, tmp_path):
    text = commands(settings)
    assert f"--model_outputs {tmp_path}/arm.json" in text and f"--reference_outputs {tmp_path}/base.json" in text
    assert "treg compare" in text and "weighted_alpaca_eval_gpt4_turbo" in text
    for benchmark, expected in (("arena_hard_v2", "data/arena-hard-v2.0/model_answer"), ("mt_bench", "llm_judge")):
        arm, baseline = (
            str(write_shards(tmp_path / f"{name} {benchmark}", name, [["x"]], benchmark)) for name in ("my arm", "base")
        )
        text = commands(dataclasses.replace(settings, arm=arm, baseline=baseline))
        assert expected in text and f"'{arm}/model_answer/my arm.jsonl'" in text
        assert subprocess.run(["sh", "-n", "-c", text], capture_output=True).returncode == 0
    arm = str(write_shards(tmp_path / "prompts", "arm", [["x"]], "prompts"))
    with pytest.raises(UserError, match="belong to no benchmark"):
        commands(dataclasses.replace(settings, arm=arm, baseline=arm))
