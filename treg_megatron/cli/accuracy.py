"""Measure a policy without a judge: does it prefer what people prefer, and how far has it moved from its reference?

    treg accuracy --recipe llama3_8b --pairs test.jsonl
    treg accuracy --model RUN --reference MODEL --pairs hub:allenai/reward-bench:filtered --output accuracy
    treg accuracy --recipe llama3_8b --pairs RUN/labelled/test          # the labels hold the reference's log-probs
    treg accuracy --recipe llama3_8b --pairs test.jsonl --answers RUN/evaluate/answers
    torchrun --nproc-per-node 8 tools/preference_accuracy.py --recipe llama3_8b --pairs test.jsonl

Accuracy is the share of pairs whose chosen response has the higher implicit reward, beta log(pi / pi_ref), and the same
for the log-prob; each also per token. Pairs are read in any format that `treg inspect --help` lists; where they have a
column `subset`, each subset has its own figures, and RewardBench's are averaged to its sections. With --answers, the KL
divergence is measured on the policy's own answers. Figures have 95 % intervals and go to accuracy.json.

Log-probs are kept in shards: rerun the same command to continue, with any number of processes. Several policies may
share the reference's (--reference-cache). Under torchrun or srun the processes share the work.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from treg_megatron.cli.arguments import parse_section, section_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg accuracy``."""
    return section_parser(prog, __doc__, "accuracy")


def run(arguments: argparse.Namespace) -> None:
    """Measure; print the figures."""
    section = parse_section(arguments, "accuracy")
    from treg_megatron.evaluation.accuracy.job import FILE_NAME, accuracy

    found = accuracy(section)
    if found is None:
        return  # other processes are still scoring; the last one prints the figures
    print("\n".join(lines(found)))
    print(f"wrote {section.output}/{FILE_NAME}")


def lines(found: Mapping[str, Any]) -> list[str]:
    """The figures as text, a line per subset and section."""
    width = max(map(len, [*found["subsets"], "subset"]))
    text = [f"{'subset':{width}}  {'pairs':>6}  {'implicit reward':>24}  {'margin':>9}  {'log-prob':>8}  per token"]
    for name, figures in found["subsets"].items():
        low, high = figures["implicit_reward_accuracy_interval"]
        accuracy = f"{figures['implicit_reward_accuracy']:.1%} [{low:.1%}, {high:.1%}]"
        text.append(
            f"{name:{width}}  {figures['pairs']:>6}  {accuracy:>24}  {figures['implicit_reward_margin']:>+9.4f}  "
            f"{figures['log_prob_accuracy']:>8.1%}  {figures['log_prob_per_token_accuracy']:>9.1%}"
        )
    for name, average in ((found["sections"] or {}).get("implicit_reward") or {}).items():
        text.append(f"RewardBench {name}: {average:.1%} by the implicit reward")
    whole = found["subsets"]["all"]
    text.append(
        f"log-prob of a response against the reference: {whole['chosen_logps_change']:+.2f} nats chosen, "
        f"{whole['rejected_logps_change']:+.2f} rejected"
    )
    if kl := found["kl"]:
        low, high = kl["nats_per_token_interval"]
        text.append(
            f"KL from the reference on {kl['prompts']} prompts: {kl['nats_per_token']:.4f} [{low:.4f}, {high:.4f}] "
            f"nats a token, {kl['nats_per_answer']:.2f} nats an answer"
        )
    dropped = "; ".join(f"{count} {reason}" for reason, count in found["drops"].items()) or "none"
    return [*text, f"dropped: {dropped}"]
