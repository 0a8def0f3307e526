"""A folder of judgments: a judge's preference between the answers of an arm and of a baseline, prompt by prompt.

``treg judge`` writes it and ``treg compare`` reads it. ``run.json`` records what the folder was begun with, the shards
``judgments-00000.jsonl`` hold one row per prompt, and ``manifest.json`` is written last.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.utils.files import read_manifest
from treg_megatron.utils.shard_job import MANIFEST_NAME

FORMAT, VERSION = "treg-megatron judgments", 1
SHARD_PATTERN = "judgments-{:05d}.jsonl"


@dataclass(frozen=True)
class Judgments:
    """The judgments of one arm against one baseline by one judge.

    Attributes:
        arm, baseline: ``name``, ``answers`` (path), ``sha256``, ``settings``, ``mean_tokens``, ``mean_characters`` and
            ``truncated`` of each side.
        judge: ``kind``, ``name`` and the settings that decide its judgments.
        benchmark: of the answers, such as ``alpaca_eval``.
        rows: one per prompt: ``prompt_id``; ``preference``, the probability in [0, 1] that the arm's answer is the
            better one (0.5: a tie), or None where the judge failed; ``arm_score`` and ``baseline_score`` or None;
            ``orders``, for judges that read both answers at once: ``arm_first``, ``preference``, ``verdict``.
        prompts_sha256: hash of the prompts, equal for all arms that may be compared.
    """

    arm: dict[str, Any]
    baseline: dict[str, Any]
    judge: dict[str, Any]
    benchmark: str
    rows: list[dict[str, Any]]
    prompts_sha256: str
    folder: Path
    manifest: dict[str, Any]


def read_judgments(path: str | Path) -> Judgments:
    """The judgments in a folder that ``treg judge`` has finished.

    Raises:
        UserError: the folder is unfinished or holds something else, or a shard is missing, damaged or incomplete.
    """
    folder = Path(path)
    manifest = read_manifest(folder / MANIFEST_NAME, FORMAT, VERSION)
    rows = [row for name in manifest["shards"] for row in read_shard(folder / name)]
    if len(rows) != manifest["prompts"]:
        raise UserError(
            f"{folder} holds {len(rows)} judgments of {manifest['prompts']} prompts; judge again into another folder"
        )
    return Judgments(
        arm=manifest["arm"],
        baseline=manifest["baseline"],
        judge=manifest["judge"],
        benchmark=manifest["benchmark"],
        rows=rows,
        prompts_sha256=manifest["prompts_sha256"],
        folder=folder,
        manifest=manifest,
    )


def read_shard(path: Path) -> list[dict[str, Any]]:
    """The rows of one shard.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with open(path, encoding="utf-8", newline="\n") as lines:
            return [json.loads(line) for line in lines]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; judge again into another folder") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); judge again into another folder") from None
