"""Measurements of a policy: the verifier's verdicts, KL from the reference, and implicit token rewards.

Shapes: P prompts, S sampled answers per prompt, I items per task, n response tokens of the credit set.
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
    """Write an .npz atomically; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with atomic_write(path) as partial:
        partial.write_bytes(buffer.getvalue())


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz, by name."""
    with np.load(path) as arrays:
        return dict(arrays)


def credit_set(labelled: dict[str, Path], pairs: Path, prompts: Path) -> dict[str, np.ndarray]:
    """The credit set: all tokens of the reference's ranked answers, on which token rewards are compared.

    Args:
        labelled: folders of the same pairs, labelled by each form of the revision requests.
        pairs: the ranked pairs.
        prompts: the prompts that they answer.

    Returns:
        right: [n] bool, the verifier's marks. reward/FORM: [n], the token rewards r_t of each form. ref_logp: [n], the
        reference's log-probs. prompt: [n] int, the number of the token's prompt.
    """
    by_id = {record["pair_id"]: record for record in data.read_records(pairs)}
    number = {record["prompt"]: i for i, record in enumerate(data.read_records(prompts))}
    columns: dict[str, list] = {}
    for same in zip(*(read_labelled(folder) for folder in labelled.values()), strict=True):
        pair, record = same[0], by_id[same[0].pair_id]
        for side in SIDES:
            tokens = {
                "right": data.marks(record, side),
                "ref_logp": getattr(pair, f"{side}_ref_logprobs"),
                "prompt": np.full(len(record[f"{side}_ids"]), number[record["prompt"][-1]["content"]]),
            }
            for form, labels in zip(labelled, same, strict=True):
                tokens[f"reward/{form}"] = getattr(labels, f"{side}_token_rewards")
            for name, values in tokens.items():
                columns.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def implicit_rewards(policy: Path, labelled: Path, credit: dict[str, np.ndarray]) -> np.ndarray:
    """[n] log pi(y_t) - log pi_ref(y_t) on the credit set: DPO's implicit token reward divided by beta."""
    sequences = [sequence for pair in read_labelled(labelled) for sequence in sequences_of(pair)]
    return np.concatenate(_scorer(policy).score(sequences)) - credit["ref_logp"]


def answers(samples: Path) -> dict[str, np.ndarray]:
    """Verdicts on sampled answers: score, length in tokens [P, S]; whether each item's result is right [P, S, I]."""
    verdicts = [
        [verify(task_of(record["messages"][-1]["content"]), response["text"]) for response in record["responses"]]
        for record in _records(samples)
    ]
    return {
        "score": np.array([[verdict.score for verdict in row] for row in verdicts]),
        "length": np.array([[len(verdict.right) for verdict in row] for row in verdicts]),
        "results": np.array([[verdict.results for verdict in row] for row in verdicts]),
    }


def divergence(policy: Path, reference: Path, samples: Path) -> np.ndarray:
    """[P, S] log pi(y) - log pi_ref(y) of answers that pi sampled at temperature 1; estimates KL(pi || pi_ref)."""
    tokenizer = load_tokenizer(reference)
    records = _records(samples)
    sequences = []
    for record in records:
        prompt = tokenizer.encode_prompt([Message(**message) for message in record["messages"]])
        sequences += [ScoredSequence(prompt, response["ids"]) for response in record["responses"]]
    ratios = [
        float(np.sum(ours - theirs, dtype=np.float64))
        for ours, theirs in zip(_scorer(policy).score(sequences), _scorer(reference).score(sequences), strict=True)
    ]
    return np.array(ratios).reshape(len(records), -1)


def curves(metrics: Path) -> dict[str, np.ndarray]:
    """Training metrics by step, [steps] each."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return {f"curve/{name}": np.array([record[name] for record in records if "loss" in record]) for name in CURVES}


def _records(samples: Path) -> list[dict]:
    return [record for path in sorted(samples.glob("samples-*.jsonl")) for record in data.read_records(path)]


def _scorer(folder: Path):
    from treg_megatron.labelling.scoring.huggingface import HuggingFaceScorer

    return HuggingFaceScorer(folder, "float32", "cpu", batch_tokens=4096)
