"""Whether arms may be compared: the same prompts, baseline and judge, and answers under the same settings."""

from collections.abc import Iterator, Sequence
from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.evaluation.comparison.arms import Arm


def require_comparable(arms: Sequence[Arm]) -> None:
    """What is unknown of an arm, such as the settings of answers that another program made, is not compared.

    Raises:
        UserError: two arms differ in more than the model; the message names in what.
    """
    first = arms[0]
    for other in arms[1:]:
        differences = list(_differences(first, other))
        if differences:
            raise UserError(
                f"{first.name} and {other.name} cannot be compared: {'; '.join(differences)}. "
                "Answer the same prompts under the same settings, and judge all arms by one judge against one baseline"
            )


def _differences(a: Arm, b: Arm) -> Iterator[str]:
    if a.benchmark != b.benchmark:
        yield f"the benchmark is {a.benchmark} and {b.benchmark}"
    only_a, only_b = a.judged.keys() - b.judged.keys(), b.judged.keys() - a.judged.keys()
    if only_a or only_b:
        example = min(only_a or only_b)
        yield f"{len(only_a)} prompts are only in the first and {len(only_b)} only in the second, such as {example}"
    elif a.prompts_sha256 and b.prompts_sha256 and a.prompts_sha256 != b.prompts_sha256:
        yield "prompts of the same ids have different texts"
    yield from _of_records("judge", a.judge, b.judge)
    yield from _of_records("baseline", a.baseline, b.baseline)
    yield from _of_records("settings", a.settings or {}, b.settings or {})


def _of_records(what: str, a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    for key in sorted(a.keys() & b.keys()):
        if a[key] != b[key]:
            yield f"{what}.{key} is {a[key]} and {b[key]}"
