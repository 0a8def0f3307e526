"""Sentences that say what the figures of a report are, and what they are not."""

from typing import Any


def of_benchmark(comparison: dict[str, Any], preposition: str = "of") -> str:
    """`` of BENCHMARK``; nothing for prompts that are of none."""
    name = comparison["benchmark"]
    return "" if name == "prompts" else f" {preposition} {name}"


def notes(comparison: dict[str, Any]) -> list[str]:
    """One paragraph each, as plain text."""
    judge, percent = comparison["judge"], round(100 * comparison["confidence"])
    name = judge.get("name", "unknown") if isinstance(judge, dict) else str(judge)
    kind = f" ({judge['kind'].replace('_', ' ')})" if isinstance(judge, dict) and judge.get("kind") else ""
    found = [
        f"{comparison['prompts']} prompts{of_benchmark(comparison)}, each arm against {comparison['baseline']}, "
        f"judged by {name}{kind}. In brackets: {percent} % intervals, resampling prompts. A difference between two "
        "arms is measured on the same prompts, so its interval may exclude 0 where those of the arms overlap."
    ]
    if any(arm["score"] is not None for arm in comparison["arms"]):
        found.append(
            "An arm's Arena-Hard score has the interval that Arena-Hard computes, resampling single games as if they "
            "were independent: it is narrower than one that resamples prompts, as that of a difference does."
        )
    if left_out := comparison.get("left_out"):
        found.append(f"{left_out} prompts are left out: the judge failed on them.")
    if note := (comparison.get("length_control") or {}).get("note"):
        found.append(note[:1].upper() + note[1:] + ("" if note.endswith(".") else "."))
    if any((arm["kl"] or {}).get("sampled", {}).get("exact") is False for arm in comparison["arms"]):
        found.append(
            "KL was measured on answers that were not sampled from the whole distribution at temperature 1: it is that "
            "of these answers."
        )
    return found
