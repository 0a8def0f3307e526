"""Judge the answers of a model against those of a baseline, prompt by prompt.

    treg judge --arm runs/a/evaluate/answers --baseline base/answers --output judged --reward-model REWARD_MODEL
    treg judge --arm runs/a/evaluate/answers --baseline gpt4_1106_preview.json --output judged --kind alpaca_eval \\
        --server https://api.openai.com/v1 --model gpt-4.1-2025-04-14 --api-key-env OPENAI_API_KEY
    treg judge --arm runs/a/evaluate/answers --baseline gpt-4-0314.jsonl --kind arena_hard --server ... --model ...
    treg judge --arm runs/a/evaluate/answers --baseline gpt-4-0314.jsonl --kind files

The judges: a reward model; your own function (messages, responses) -> numbers; a chat server by one of alpaca_eval's
annotators (install alpaca-eval in an environment of its own) or by Arena-Hard's prompt. Kind files prints the commands
that judge the same files elsewhere. The judge of the T-REG paper, gpt-4-1106-preview, has been retired: its numbers
cannot be judged anew, and every arm of a comparison, plain DPO included, needs one and the same judge.

A judge that is asked twice may cost twice, so each reply is kept in judge.cache. If judging stops, or the server goes
away, rerun the same command to continue. Next: treg compare.
"""

import argparse

from treg_megatron.cli.arguments import parse_section, section_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg judge``."""
    return section_parser(prog, __doc__, "judge")


def run(arguments: argparse.Namespace) -> None:
    """Judge, and print what was found."""
    section = parse_section(arguments, "judge")
    if section.kind == "files":
        from treg_megatron.evaluation.judges.elsewhere import commands

        print(commands(section), end="")
        return
    from treg_megatron.evaluation.judge import judge
    from treg_megatron.evaluation.judgment_folder import read_judgments

    judge(section)
    judgments = read_judgments(section.output)
    preferences = [row["preference"] for row in judgments.rows if row["preference"] is not None]
    mean = f"{100 * sum(preferences) / len(preferences):.1f} %" if preferences else "unknown"
    print(
        f"{judgments.judge['name']} judged {len(preferences)} of {len(judgments.rows)} answers of "
        f"{judgments.arm['name']} against {judgments.baseline['name']} into {section.output} "
        f"(mean preference {mean}, failed: {len(judgments.rows) - len(preferences)})"
    )
