"""What can be compared: a run, a folder of judgments, or the judgment files of AlpacaEval and Arena-Hard."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from treg_megatron.data.records import read_rows
from treg_megatron.errors import UserError
from treg_megatron.evaluation.answer_folder import Answers, prompt_hash, prompts_hash, read_answers
from treg_megatron.evaluation.comparison.bradley_terry import Game, game, score
from treg_megatron.evaluation.judgment_folder import Judgments, read_judgments

JUDGMENTS = Path("evaluate") / "judgments"  # of a run, by recipes/base.yaml

# Arena-Hard v0.1 compares with this model; its first judgment files name neither it nor a category.
_ARENA_HARD_V1, _ARENA_HARD_V1_BASELINE = "arena-hard-v0.1", "gpt-4-0314"


class Texts(NamedTuple):
    """Both answers to a prompt."""

    arm: str
    baseline: str


@dataclass(frozen=True)
class Judged:
    """A judgment of one prompt.

    Attributes:
        preference: probability in [0, 1] that the arm's answer is the better one; None where the judge failed.
        games: by Arena-Hard's verdicts; empty for other judges.
        texts: the answers; None where they are not at hand.
    """

    preference: float | None
    games: tuple[Game, ...] = ()
    texts: Texts | None = None


@dataclass(frozen=True)
class Arm:
    """A model under evaluation, judged against a baseline.

    Attributes:
        judge, baseline: what identifies them. A key that only one of two arms has is not compared.
        settings: sampling settings of the answers; None if unknown.
        judged: by prompt id, in the order of the benchmark.
        prompts_sha256: hash of the prompts; None if only their ids are known.
        folders: ``judgments``, and where known ``answers``, ``baseline_answers`` and ``run``.
    """

    name: str
    benchmark: str
    judge: dict[str, Any]
    baseline: dict[str, Any]
    settings: dict[str, Any] | None
    judged: dict[str, Judged]
    prompts_sha256: str | None
    mean_tokens: float | None
    mean_characters: float | None
    truncated_share: float | None
    folders: dict[str, Path] = field(default_factory=dict)


def read_arms(paths: Sequence[str | Path], category: str | None = None) -> list[Arm]:
    """:func:`read_arm` of each path. An arm of the same name as another is called by its path as well."""
    arms = [read_arm(path, category) for path in paths]
    names = [arm.name for arm in arms]
    return [
        replace(arm, name=f"{arm.name} ({path})") if names.count(arm.name) > 1 else arm
        for arm, path in zip(arms, paths, strict=True)
    ]


def read_arm(path: str | Path, category: str | None = None) -> Arm:
    """The arm that was judged.

    Args:
        path: a run's folder, a folder of judgments, alpaca_eval's ``annotations.json``, or a file of Arena-Hard's
            ``model_judgment``.
        category: of a file of Arena-Hard, the prompts to keep. The categories of v2 have different baselines.

    Raises:
        UserError: there are no judgments, they are unfinished, or the file is of another form.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        folder = path / JUDGMENTS if (path / JUDGMENTS).exists() else path
        if not (folder / "manifest.json").exists() and not (folder / "run.json").exists():
            raise UserError(
                f"{path} holds no judgments: neither here nor in {path / JUDGMENTS}; run `treg judge` first"
            )
        return _of_folder(read_judgments(folder))
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run, a folder of judgments, or a file of judgments")
    rows = [row for _, row in read_rows(path)]
    first = rows[0] if rows and isinstance(rows[0], dict) else {}
    if {"preference", "generator_1", "generator_2"} <= first.keys():
        return _of_annotations(rows, path)
    if {"games", "model"} <= first.keys():
        kept = [row for row in rows if category in (None, row.get("category"))]
        if not kept:
            raise UserError(f"{path} holds no judgments of the category {category}")
        return _of_arena_hard(kept, path)
    raise UserError(
        f"{path} holds no judgments of a form that can be read: alpaca_eval's annotations have the keys preference, "
        "generator_1 and generator_2, Arena-Hard's judgments model and games"
    )


def _of_folder(judgments: Judgments) -> Arm:
    side, baseline = judgments.arm, judgments.baseline
    folders = {"judgments": judgments.folder}
    for folder in (judgments.folder, Path(side["answers"])):
        if folder.absolute().parent.name == JUDGMENTS.parts[0]:
            folders.setdefault("run", folder.absolute().parents[1])
    texts: dict[str, Texts] = {}
    if Path(side["answers"]).exists() and Path(baseline["answers"]).exists():
        folders |= {"answers": Path(side["answers"]), "baseline_answers": Path(baseline["answers"])}
        texts = _texts(read_answers(side["answers"]), read_answers(baseline["answers"]))
    truncated = side["truncated"]
    of_arena_hard = judgments.judge["kind"] == "arena_hard"
    return Arm(
        name=side["name"],
        benchmark=judgments.benchmark,
        judge=judgments.judge,
        baseline={key: baseline[key] for key in ("name", "sha256", "settings") if baseline[key] is not None},
        settings=side["settings"],
        judged={
            row["prompt_id"]: Judged(
                row["preference"],
                _games((order["verdict"], order["arm_first"]) for order in row["orders"]) if of_arena_hard else (),
                texts=texts.get(row["prompt_id"]),
            )
            for row in judgments.rows
        },
        prompts_sha256=judgments.prompts_sha256,
        mean_tokens=side["mean_tokens"],
        mean_characters=side["mean_characters"],
        truncated_share=None if truncated is None else truncated / len(judgments.rows),
        folders=folders,
    )


def _texts(arm: Answers, baseline: Answers) -> dict[str, Texts]:
    """Both answers by prompt, those to several turns one after the other."""
    of_baseline = {row["prompt_id"]: _text(row) for row in baseline.rows}
    return {
        row["prompt_id"]: Texts(_text(row), of_baseline[row["prompt_id"]])
        for row in arm.rows
        if row["prompt_id"] in of_baseline
    }


def _text(row: dict[str, Any]) -> str:
    return "\n\n".join(answer["text"] for answer in row["answers"])


def _of_annotations(rows: list[Any], path: Path) -> Arm:
    judged: dict[str, Judged] = {}
    prompts = []
    for number, row in enumerate(rows, 1):
        try:
            messages = [{"role": "user", "content": row["instruction"]}]
            texts = Texts(row["output_2"], row["output_1"])
            if not all(isinstance(text, str) for text in (row["instruction"], *texts)):
                raise ValueError("instruction and outputs must be text")
            one = Judged(_of_alpaca_eval(row["preference"]), texts=texts)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} row {number} is no annotation of alpaca_eval: {error!r}") from None
        prompt_id = prompt_hash(messages)
        prompts.append({"prompt_id": prompt_id, "messages": messages})
        _add(judged, prompt_id, one, path)
    return Arm(
        name=_only(rows, "generator_2", path),
        benchmark="alpaca_eval",
        judge={"kind": "alpaca_eval", "name": _only(rows, "annotator", path)},
        baseline={"name": _only(rows, "generator_1", path)},
        settings=None,
        judged=judged,
        prompts_sha256=prompts_hash(prompts),
        mean_tokens=None,
        mean_characters=sum(len(one.texts.arm) for one in judged.values() if one.texts) / len(judged),
        truncated_share=None,
        folders={"judgments": path},
    )


def _of_alpaca_eval(preference: float | None) -> float | None:
    """alpaca_eval's preference: 1 for the baseline to 2 for the arm, 0 for a tie, none where the judge failed."""
    if preference is None or preference != preference:
        return None
    if preference != 0 and not 1 <= preference <= 2:
        raise ValueError(f"the preference {preference} is neither 0 nor from 1 to 2")
    return float(preference) - 1 if preference else 0.5


def _of_arena_hard(rows: list[Any], path: Path) -> Arm:
    judged: dict[str, Judged] = {}
    for number, row in enumerate(rows, 1):
        try:
            prompt_id = str(row["uid"] if "uid" in row else row["question_id"])
            # the first game shows the baseline's answer first
            verdicts = [(one and one["score"], place == 1) for place, one in enumerate(row["games"])]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} row {number} is no judgment of Arena-Hard: {error!r}") from None
        games = _games(verdicts)
        whole = bool(games) and len(games) == len(verdicts)  # arena-hard-auto leaves out pairs that miss a verdict
        _add(judged, prompt_id, Judged(score(games) / 100 if whole else None, games), path)
    v1 = _only(rows, "category", path, _ARENA_HARD_V1) == _ARENA_HARD_V1
    return Arm(
        name=_only(rows, "model", path),
        benchmark="arena_hard_v0.1" if v1 else "arena_hard_v2",
        judge={"kind": "arena_hard", "name": _only(rows, "judge", path)},
        baseline={"name": _only(rows, "baseline", path, _ARENA_HARD_V1_BASELINE)},
        settings=None,
        judged=judged,
        prompts_sha256=None,
        mean_tokens=None,
        mean_characters=None,
        truncated_share=None,
        folders={"judgments": path},
    )


def _games(verdicts: Iterable[tuple[str | None, bool]]) -> tuple[Game, ...]:
    games = (game(verdict, arm_first) for verdict, arm_first in verdicts)
    return tuple(one for one in games if one)


def _add(judged: dict[str, Judged], prompt_id: str, one: Judged, path: Path) -> None:
    if prompt_id in judged:
        raise UserError(f"{path} judges prompt {prompt_id} twice")
    judged[prompt_id] = one


def _only(rows: list[Any], key: str, path: Path, default: str = "unknown") -> str:
    """The one value that all rows have."""
    values = sorted({str(row.get(key, default)) for row in rows})
    if len(values) > 1:
        raise UserError(f"{path} holds judgments of several: {key} is {', '.join(values)}; compare one at a time")
    return values[0]
