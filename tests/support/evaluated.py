"""An evaluation on disk: answers, judgments and runs of a baseline and three arms, and their comparison."""

import json
import random
from pathlib import Path
from typing import Any

from treg_megatron.evaluation import answer_folder, judgment_folder
from treg_megatron.utils.files import write_manifest

ALPHAS = (0.0, 0.1, 0.25)
BASELINE = "base"
HOSTILE = [
    "</script><script>document.title = 'broken'</script>",
    "<!-- <script> ${1 + 1} __DATA__ $title \\u003c",
    "<img src=x onerror=\"document.title = 'broken'\">",
    "null \x00 bell \x07 escape \x1b[2J turned \u202eevil\u202c lines \u2028 \u2029 end",
    "```\n# heading | cell <b>bold</b>\n```",
]
_WORDS = (
    "the river runs past old stone bridges and small towns where people sell bread cheese and fruit every morning "
    "while boats wait for rain because water is low in summer and nobody hurries"
).split()


def text_of(seed: int, words: int) -> str:
    """Sentences of random words."""
    draw = random.Random(seed)
    sentences = []
    while words > 0:
        length = min(words, draw.randint(4, 14))
        sentences.append(" ".join(draw.choices(_WORDS, k=length)).capitalize() + ".")
        words -= length
    return " ".join(sentences)


def changed(text: str, seed: int, share: float) -> str:
    """The text with some words replaced."""
    draw = random.Random(seed)
    return " ".join(draw.choice(_WORDS) if draw.random() < share else word for word in text.split(" "))


def evaluation(folder: Path, prompts: int, hostile: bool = False, words: int = 60) -> dict[str, Any]:
    """Write an evaluation below ``folder`` and return its comparison. Prompt i has category ``even`` or ``odd``.

    The preference of arm a at prompt i is ``i % 5 / 4``, turned round for the last arm.
    """
    ids = [f"prompt {number}" for number in range(prompts)]
    asked = {one: f"Question {number}: {text_of(number, 12)}" for number, one in enumerate(ids)}
    base = {one: text_of(1000 + number, words + 7 * (number % 9)) for number, one in enumerate(ids)}
    if hostile:
        for number, one in enumerate(ids):
            asked[one] = HOSTILE[number % len(HOSTILE)]
            base[one] = f"{HOSTILE[(number + 1) % len(HOSTILE)]} half \ud800 {base[one]}"
    _write_answers(folder / "baseline", BASELINE, asked, base)
    arms = []
    for place, alpha in enumerate(ALPHAS):
        name = f"alpha {alpha:g}"
        run = folder / f"run-{alpha:g}"
        texts = {
            one: " ".join([changed(base[one], number + place, 0.2), *([text_of(number, length)] if length else [])])
            for number, one in enumerate(ids)
            for length in [5 * (number % 4) * place]
        }
        _write_answers(run / "evaluate" / "answers", name, asked, texts)
        preferences = [(4 - number % 5) / 4 if alpha == ALPHAS[-1] else number % 5 / 4 for number in range(prompts)]
        _write_judgments(run, name, folder / "baseline", ids, preferences)
        _write_metrics(run, place)
        arms.append(_arm(name, alpha, place, run, 100 * sum(preferences) / prompts))
    return {
        "benchmark": "alpaca_eval",
        "judge": {"kind": "reward_model", "name": "tiny-rm"},
        "baseline": BASELINE,
        "prompts": prompts,
        "left_out": 0,
        "confidence": 0.95,
        "length_control": {"form": "none", "note": "no length-controlled win rate: alpaca_eval is not installed"},
        "arms": arms,
        "differences": [
            {
                "a": "alpha 0.25",
                "b": "alpha 0",
                "win_rate": -1.25,
                "interval": [-3.5, 1.0],
                "length_controlled": None,
                "length_controlled_interval": None,
                "score": None,
                "score_interval": None,
                "wins": 300,
                "losses": 320,
                "ties": 185,
                "sign_test_p": 0.44,
            }
        ],
    }


def _arm(name: str, alpha: float, place: int, run: Path, win_rate: float) -> dict[str, Any]:
    return {
        "name": name,
        "run": str(run),
        "recipe": str(run / "train" / "recipe.yaml"),
        "checkpoint": str(run / "train" / "checkpoints" / "step_000100"),
        "answers": str(run / "evaluate" / "answers"),
        "baseline_answers": None,
        "judgments": str(run / "evaluate" / "judgments"),
        "objective": {"loss_type": "dpo", "beta": 0.01, "alpha": alpha},
        "win_rate": win_rate,
        "win_rate_interval": [win_rate - 2.5, win_rate + 2.4],
        "length_controlled": None,
        "length_controlled_interval": None,
        "length_control": "none",
        "score": None,
        "score_interval": None,
        "mean_tokens": 210.0 + 30 * place,
        "mean_characters": 900.0 + 120 * place,
        "truncated_share": 0.0125,
        "accuracy": {"implicit_reward": 0.61 + 0.02 * place, "log_prob": 0.55, "pairs": 400},
        "kl": {
            "nats_per_token": 0.02 + 0.015 * place,
            "nats_per_token_interval": [0.017 + 0.015 * place, 0.024 + 0.015 * place],
        },
    }


def _write_answers(folder: Path, name: str, asked: dict[str, str], texts: dict[str, str]) -> None:
    rows = [
        {
            "prompt_id": one,
            "messages": [{"role": "user", "content": asked[one]}],
            "answers": [{"text": text, "ids": None, "finished": number % 40 != 3, "tokens": len(text.split())}],
            "category": "odd" if number % 2 else "even",
            "dataset": None,
        }
        for number, (one, text) in enumerate(texts.items())
    ]
    shard = answer_folder.SHARD_PATTERN.format(0)
    folder.mkdir(parents=True)
    (folder / shard).write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "name": name,
        "benchmark": "alpaca_eval",
        "prompts": len(rows),
        "prompts_sha256": answer_folder.prompts_hash(rows),
        "settings": {},
        "shards": [shard],
    }
    write_manifest(folder / "manifest.json", answer_folder.FORMAT, answer_folder.VERSION, content)


def _write_judgments(run: Path, name: str, baseline: Path, ids: list[str], preferences: list[float]) -> None:
    folder = run / "evaluate" / "judgments"
    folder.mkdir(parents=True)
    rows = [
        {
            "prompt_id": one,
            "preference": preference,
            "arm_score": round(2 * preference - 0.7 + number % 7 / 10, 3),
            "baseline_score": number % 11 / 10 - 0.5,
            "orders": [],
        }
        for number, (one, preference) in enumerate(zip(ids, preferences))
    ]
    shard = judgment_folder.SHARD_PATTERN.format(0)
    (folder / shard).write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "benchmark": "alpaca_eval",
        "arm": {"name": name, "answers": str(run / "evaluate" / "answers")},
        "baseline": {"name": BASELINE, "answers": str(baseline)},
        "judge": {"kind": "reward_model", "name": "tiny-rm"},
        "prompts": len(rows),
        "prompts_sha256": "of a test",
        "shards": [shard],
    }
    write_manifest(folder / "manifest.json", judgment_folder.FORMAT, judgment_folder.VERSION, content)


def _write_metrics(run: Path, place: int) -> None:
    draw = random.Random(place)
    lines = []
    for step in range(1, 101):
        moved = step / 100 * (1 + place / 4)
        lines.append(
            {
                "step": step,
                "loss": 0.693 - 0.2 * moved + draw.gauss(0, 0.02),
                "rewards/margins": moved + draw.gauss(0, 0.05),
                "rewards/accuracies": min(1, 0.5 + 0.3 * moved + draw.gauss(0, 0.05)),
            }
        )
        if step % 20 == 0:
            lines.append(
                {"step": step, "validation/loss": 0.69 - 0.15 * moved, "validation/rewards/margins": 0.8 * moved}
            )
    (run / "train").mkdir(parents=True)
    (run / "train" / "recipe.yaml").write_text("name: test\n")
    (run / "train" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 10')
