"""What is measured of a policy: answers by the verifier, distance from the reference, and where its rewards lie.

Shapes: P prompts, S sampled answers to each, I items of a task, n response tokens of the credit set.
"""

import io
import json
from pathlib import Path

import numpy as np

from studies.miniature import data
from studies.miniature.world import task_of, verify
from treg_megatron.data.labelled_pairs import SIDES, read_labelled
from treg_megatron.labelling.scoring import ScoredSequence, sequences_of
from treg_megatron.tokenizer.chat import load_tokenizer
from treg_megatron.tokenizer.conversation import Message
from treg_megatron.utils.files import atomic_write

CURVES = ("step", "loss/preference", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An .npz, whole or not at all, with the same bytes for the same arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with atomic_write(path) as partial:
        partial.write_bytes(buffer.getvalue())


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


def credit_set(labelled: Path, pairs: Path) -> dict[str, np.ndarray]:
    """The reference's ranked answers token by token, on which credit is measured.

    Returns:
        right: [n] bool, the verifier's marks. reward: [n] the labels r_t. ref_logp: [n]. pair: [n] int, whose token.
    """
    by_id = {row["pair_id"]: row for row in data.read_records(pairs)}
    columns: dict[str, list] = {"right": [], "reward": [], "ref_logp": [], "pair": []}
    for number, pair in enumerate(read_labelled(labelled)):
        for side in SIDES:
            columns["right"].append(data.marks(by_id[pair.pair_id], side))
            columns["reward"].append(getattr(pair, f"{side}_token_rewards"))
            columns["ref_logp"].append(getattr(pair, f"{side}_ref_logprobs"))
            columns["pair"].append(np.full(len(columns["reward"][-1]), number))
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def implicit_rewards(policy: Path, labelled: Path, credit: dict[str, np.ndarray]) -> np.ndarray:
    """[n] log pi(y_t) - log pi_ref(y_t) of the tokens of the credit set: DPO's token reward over beta."""
    sequences = [sequence for pair in read_labelled(labelled) for sequence in sequences_of(pair)]
    return np.concatenate(_scorer(policy).score(sequences)) - credit["ref_logp"]


def answers(samples: Path) -> dict[str, np.ndarray]:
    """Verdicts on sampled answers: score, length in tokens [P, S]; results, whether each item's is right [P, S, I]."""
    verdicts = [
        [verify(task_of(row["messages"][-1]["content"]), response["text"]) for response in row["responses"]]
        for row in _rows(samples)
    ]
    return {
        "score": np.array([[verdict.score for verdict in row] for row in verdicts]),
        "length": np.array([[len(verdict.right) for verdict in row] for row in verdicts]),
        "results": np.array([[verdict.results for verdict in row] for row in verdicts]),
    }


def divergence(policy: Path, reference: Path, samples: Path) -> np.ndarray:
    """[P, S] log pi(y) - log pi_ref(y) of answers that pi sampled at temperature 1; the mean is KL(pi || pi_ref)."""
    tokenizer = load_tokenizer(reference)
    rows = _rows(samples)
    sequences = []
    for row in rows:
        prompt = tokenizer.encode_prompt([Message(**message) for message in row["messages"]])
        sequences += [ScoredSequence(prompt, response["ids"]) for response in row["responses"]]
    ratios = [
        float(np.sum(ours - theirs, dtype=np.float64))
        for ours, theirs in zip(_scorer(policy).score(sequences), _scorer(reference).score(sequences), strict=True)
    ]
    return np.array(ratios).reshape(len(rows), -1)


def curves(metrics: Path) -> dict[str, np.ndarray]:
    """Training metrics by step."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return {f"curve/{name}": np.array([record[name] for record in records if "loss" in record]) for name in CURVES}


def _rows(samples: Path) -> list[dict]:
    return [row for path in sorted(samples.glob("samples-*.jsonl")) for row in data.read_records(path)]


def _scorer(folder: Path):
    from treg_megatron.labelling.scoring.huggingface import HuggingFaceScorer

    return HuggingFaceScorer(folder, "float32", "cpu", batch_tokens=4096)
