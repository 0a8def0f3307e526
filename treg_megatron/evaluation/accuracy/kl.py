"""KL divergence of a policy from its reference on the policy's own samples.

For an answer y ~ pi and l_t = log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t), two estimates of the sum over t of
KL(pi(. | x, y_<t) || pi_ref(. | x, y_<t)), both without bias (Schulman, "Approximating KL Divergence", 2020):

    k1 = sum_t l_t                    the plain log-ratio
    k3 = sum_t exp(-l_t) - 1 + l_t    never negative, and less noisy where the divergence is small

Both hold for samples at temperature 1 from the whole vocabulary. At another temperature, or with top-p, an answer is
likelier or less likely than under pi, and the figure is that of the answers as they were sampled.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from treg_megatron.errors import UserError
from treg_megatron.evaluation.accuracy.cluster_bootstrap import ratio_intervals
from treg_megatron.evaluation.accuracy.log_probs import Item, sequence
from treg_megatron.evaluation.answer_folder import Answers
from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.tokenizer.conversation import Message


def answer_items(answers: Answers, tokenizer: ChatTokenizer) -> list[Item]:
    """The sampled ids of each answer after its prompt; a later turn's prompt holds the turns before it.

    Raises:
        UserError: an answer has no sampled ids, or ids of another tokenizer.
    """
    items = []
    for row in answers.rows:
        conversation: list[Message] = []
        sequences = []
        turns = iter(row["answers"])
        for message in row["messages"]:
            conversation.append(Message(message["role"], message["content"]))
            if message["role"] != "user":
                continue
            answer = next(turns)
            ids = answer["ids"]
            if ids is None:
                raise UserError(
                    f"{answers.folder}: the answer to {row['prompt_id']} has no sampled ids, which the KL is measured "
                    "on; answer with an engine that gives them, or leave accuracy.answers out"
                )
            if max(ids, default=0) >= tokenizer.vocab_size:
                raise UserError(
                    f"{answers.folder}: the answer to {row['prompt_id']} holds the id {max(ids)}, but the tokenizer "
                    f"has only {tokenizer.vocab_size} tokens: it is another model's"
                )
            if ids:  # none where no position was left for an answer
                sequences.append(sequence(tokenizer.encode_prompt(conversation), ids))
            conversation.append(Message("assistant", answer["text"]))
        masks = tuple(np.ones(len(one.response_ids), dtype=bool) for one in sequences)
        if sequences:
            items.append(Item(row["prompt_id"], tuple(sequences), masks))
    if not items:
        raise UserError(f"{answers.folder}: every answer is empty, and there is nothing to measure the KL on")
    return items


def kl_figures(
    policy: Iterable[Sequence[np.ndarray]], reference: Iterable[Sequence[np.ndarray]], confidence: float
) -> dict[str, Any]:
    """The divergence in nats a token and an answer, each with an interval by a bootstrap over prompts.

    Args:
        policy: for each prompt, log pi of each answer's tokens, [tokens] fp32.
        reference: the same of log pi_ref.
        confidence: of the intervals.

    Returns:
        ``prompts``, ``tokens``, ``estimator``; ``nats_per_token`` and ``nats_per_answer`` by k3,
        ``log_ratio_per_token`` by k1, each with ``..._interval``.
    """
    sums = []
    for of_policy, of_reference in zip(policy, reference, strict=True):
        log_ratio = (np.concatenate(of_policy) - np.concatenate(of_reference)).astype(np.float64)
        k3 = np.expm1(-log_ratio) + log_ratio
        sums.append((k3.sum(), log_ratio.sum(), len(log_ratio), len(of_policy)))
    k3s, k1s, tokens, answers = np.array(sums, np.float64).T
    found, intervals = ratio_intervals(
        np.stack([k3s, k3s, k1s], axis=1),
        np.stack([tokens, answers, tokens], axis=1),
        np.arange(len(sums)),
        confidence,
    )
    figures: dict[str, Any] = {"prompts": len(sums), "tokens": int(tokens.sum()), "estimator": "k3"}
    names = ("nats_per_token", "nats_per_answer", "log_ratio_per_token")
    for name, value, interval in zip(names, found, intervals, strict=True):
        figures[name] = float(value)
        figures[f"{name}_interval"] = interval.tolist()
    return figures
