"""The commands that judge the files of an arm elsewhere, by the benchmarks' own tools."""

import shlex
from pathlib import Path

from treg_megatron.config.schema import JudgeSection
from treg_megatron.errors import UserError
from treg_megatron.evaluation.answer_folder import Answers, read_answers
from treg_megatron.evaluation.judge import matched
from treg_megatron.evaluation.judges.alpaca_eval import PACKAGE
from treg_megatron.evaluation.judges.arena_hard import read_prompts

_ARENA_HARD_FOLDERS = {"arena_hard_v0.1": "arena-hard-v0.1", "arena_hard_v2": "arena-hard-v2.0"}


def commands(section: JudgeSection) -> str:
    """Shell commands that judge ``section.arm`` against ``section.baseline``, and what to do with the result.

    Raises:
        UserError: the two sides do not belong together, or no tool reads the benchmark's files.
    """
    arm, baseline = read_answers(section.arm), read_answers(section.baseline)
    if arm.benchmark != baseline.benchmark:
        raise UserError(f"{arm.folder} answers {arm.benchmark}, {baseline.folder} {baseline.benchmark}: name the same")
    matched(arm, baseline)
    if arm.benchmark == "alpaca_eval":
        return _alpaca_eval(section, arm, baseline)
    if arm.benchmark in _ARENA_HARD_FOLDERS:
        return _arena_hard(section, arm, baseline)
    if arm.benchmark == "mt_bench":
        return _mt_bench(section, arm, baseline)
    raise UserError(
        f"{arm.folder} answers prompts that belong to no benchmark, so there is no tool that judges them: choose "
        "another judge.kind"
    )


def _alpaca_eval(section: JudgeSection, arm: Answers, baseline: Answers) -> str:
    return f"""\
# a Python environment with {PACKAGE}, and the judge's key in OPENAI_API_KEY (OPENAI_API_BASE for another server);
# the annotator names the model that it asks
alpaca_eval evaluate --model_outputs {_file(arm)} \\
    --reference_outputs {_file(baseline)} \\
    --annotators_config {shlex.quote(section.annotator)} --fn_metric get_winrate --sort_by win_rate \\
    --precomputed_leaderboard None --output_path {_quoted(section.output)}
treg compare {_quoted(section.output)}/{shlex.quote(section.annotator)}/annotations.json
"""


def _arena_hard(section: JudgeSection, arm: Answers, baseline: Answers) -> str:
    name = _ARENA_HARD_FOLDERS[arm.benchmark]
    judge = section.model or read_prompts()["benchmarks"][arm.benchmark]["judge_model"]
    answers = f"data/{name}/model_answer"
    return f"""\
# the judge's key in OPENAI_API_KEY (OPENAI_BASE_URL for another server); arena-hard-auto's requirements are installed
git clone https://github.com/lmarena/arena-hard-auto && cd arena-hard-auto
mkdir -p {answers}
cp {_file(arm)} {answers}/{shlex.quote(arm.name)}.jsonl
cp {_file(baseline)} {answers}/{shlex.quote(baseline.name)}.jsonl
sed -i {_sed('"baseline": "[^"]*"', f'"baseline": "{baseline.name}"')} utils/judge_utils.py
sed {_sed("^judge_model: .*", f"judge_model: {judge}")} config/{name}.yaml |
    sed {_sed("^  - [a-z].*", f"  - {arm.name}")} >config/treg.yaml
printf '%s:\\n    model: %s\\n    endpoints: null\\n    api_type: openai\\n    parallel: {section.concurrency}\\n' \\
    {shlex.quote(judge)} {shlex.quote(judge)} >config/treg-judge.yaml
python gen_judgment.py --setting-file config/treg.yaml --endpoint-file config/treg-judge.yaml
treg compare data/{name}/model_judgment/{shlex.quote(judge)}/{shlex.quote(arm.name)}.jsonl
"""


def _mt_bench(section: JudgeSection, arm: Answers, baseline: Answers) -> str:
    judge = shlex.quote(section.model or "gpt-4")
    return f"""\
# the judge's key in OPENAI_API_KEY; FastChat's requirements are installed
git clone https://github.com/lm-sys/FastChat && cd FastChat/fastchat/llm_judge
mkdir -p data/mt_bench/model_answer
cp {_file(arm)} data/mt_bench/model_answer/{shlex.quote(arm.name)}.jsonl
cp {_file(baseline)} data/mt_bench/model_answer/{shlex.quote(baseline.name)}.jsonl
echo | python gen_judgment.py --mode pairwise-baseline --baseline-model {shlex.quote(baseline.name)} \\
    --model-list {shlex.quote(arm.name)} --judge-model {judge} --parallel {section.concurrency}
python show_result.py --mode pairwise-baseline --baseline-model {shlex.quote(baseline.name)} --judge-model {judge}
"""


def _file(side: Answers) -> str:
    """The file of one side that the benchmark's tools read, quoted for a shell."""
    if side.manifest is None:
        return _quoted(side.folder)
    return _quoted(side.folder / side.manifest["files"][0])


def _quoted(path: str | Path) -> str:
    return shlex.quote(str(Path(path).absolute()))


def _sed(pattern: str, replacement: str) -> str:
    """A substitution of sed, quoted for a shell."""
    literal = replacement.replace("\\", "\\\\").replace("&", "\\&").replace("|", "\\|")
    return shlex.quote(f"s|{pattern}|{literal}|")
