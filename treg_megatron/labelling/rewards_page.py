"""Reports on labelled pairs: an HTML page, and text for the terminal."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treg_megatron.data.labelled_pairs import SIDES, LabelledPair
from treg_megatron.data.scored import is_scored
from treg_megatron.labelling.contrastive import contrastive_rewards
from treg_megatron.labelling.quality.charts import charts
from treg_megatron.labelling.quality.correlation import correlations
from treg_megatron.labelling.quality.figures import Figures, shown_correlation
from treg_megatron.labelling.scoring import Scorer, sequences_of
from treg_megatron.utils.files import atomic_write
from treg_megatron.utils.terminal import without_control_bytes

TEMPLATE = Path(__file__).resolve().parent / "pages" / "rewards.html"


def policy_rewards(pairs: Sequence[LabelledPair], policy: Scorer) -> list[dict[str, np.ndarray]]:
    """Implicit token rewards of a trained policy: for each pair and side [n] fp32 in (-0.5, 0.5).

    sigma(log pi_theta(y_t) - log pi_ref(y_t)) - 0.5: the implicit token reward of DPO, log(pi_theta / pi_ref) up to
    beta (Rafailov et al., "From r to Q*", arXiv:2404.12358), squashed in the same way as the contrastive reward.
    """
    logps = iter(policy.score([sequence for pair in pairs for sequence in sequences_of(pair)]))
    return [
        {side: contrastive_rewards(next(logps), getattr(pair, f"{side}_ref_logprobs")) for side in SIDES}
        for pair in pairs
    ]


def write_page(
    path: str | Path,
    source: str,
    figures: Figures,
    pairs: Sequence[LabelledPair],
    decode: Callable[[list[int]], str],
    policy: Sequence[dict[str, np.ndarray]] | None = None,
) -> None:
    """Write one self-contained HTML file.

    Args:
        path: the file to write.
        source: one line that says what is shown.
        figures: quality of the token rewards of all labelled pairs.
        pairs: the pairs to show.
        decode: token ids to text.
        policy: :func:`policy_rewards` of ``pairs``.
    """
    summary = figures.lines() + (_policy_lines(pairs, policy) if policy else [])
    content = {
        "source": source,
        "warnings": figures.warnings,
        "summary": summary,
        "charts": charts(figures),
        "pairs": [
            _page_pair(number, pair, decode, policy[number] if policy else None) for number, pair in enumerate(pairs)
        ],
    }
    # a `<` in a text could end the script element
    data = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    with atomic_write(path) as partial:
        partial.write_text(TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", data), encoding="utf-8")


def text_report(
    figures: Figures,
    pairs: Sequence[LabelledPair],
    decode: Callable[[list[int]], str],
    colour: bool,
    policy: Sequence[dict[str, np.ndarray]] | None = None,
) -> Iterator[str]:
    """The same report for a terminal, line by line; tokens are shaded with ``colour``, else followed by rewards."""
    yield from aligned(figures.lines() + (_policy_lines(pairs, policy) if policy else []))
    yield from (f"\nwarning: {warning}" for warning in figures.warnings)
    for number, pair in enumerate(pairs):
        yield f"\n== {without_control_bytes(pair.pair_id)}"
        yield without_control_bytes(
            pair.prompt
            if pair.prompt is not None
            else decode(pair.chosen_tokens[: -len(pair.chosen_token_rewards)].tolist())
        )
        for side in SIDES:
            rewards = shown_rewards(getattr(pair, f"{side}_token_rewards"))
            ids = getattr(pair, f"{side}_tokens")[-len(rewards) :].tolist()
            texts = [without_control_bytes(text) for text in token_texts(ids, decode)]
            columns = {side: rewards}
            if policy:
                columns[f"{side}, the policy's implicit rewards"] = policy[number][side]
            for name, values in columns.items():
                yield f"-- {name}, mean {values.mean():+.4f}"
                yield "".join(
                    _in_terminal(text, float(r)) if colour else f"{text}[{r:+.2f}]"
                    for text, r in zip(texts, values, strict=True)
                )


def aligned(lines: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Names and values in columns."""
    columns = max(map(len, lines))
    widths = [max((len(line[i]) for line in lines if len(line) == columns), default=0) for i in range(columns)]
    widths[0] = max(len(line[0]) for line in lines)
    for line in lines:
        padded = (f"{text:{width}}" for text, width in zip(line, widths, strict=False))
        yield without_control_bytes("  ".join(padded).rstrip())


def token_texts(ids: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text that each token adds. A character that spans several tokens appears with the last of them."""
    texts, text, waiting = [], "", 0
    for end in range(1, len(ids) + 1):
        # decoding a window is enough: no character has more tokens than bytes
        start = max(0, end - 8 - waiting)
        before, now = decode(ids[start : end - 1 - waiting]), decode(ids[start:end])
        text = now[len(before) :]
        unfinished = text.endswith("\ufffd") and waiting < 4 and end < len(ids)
        texts.append("" if unfinished else text)
        waiting = waiting + 1 if unfinished else 0
    return texts


def _policy_lines(pairs: Sequence[LabelledPair], policy: Sequence[dict[str, np.ndarray]]) -> list[tuple[str, ...]]:
    """How the policy's implicit rewards relate to the labels, over the pairs shown."""
    scored = {side: [is_scored(getattr(pair, f"{side}_token_rewards")) for pair in pairs] for side in SIDES}
    given = {side: [getattr(pair, f"{side}_token_rewards") for pair in pairs] for side in SIDES}
    labels = {side: np.concatenate(_scored(given[side], scored[side])) for side in SIDES}
    implicit = {side: np.concatenate(_scored([p[side] for p in policy], scored[side])) for side in SIDES}
    both = np.column_stack([np.concatenate([of[side] for side in SIDES]) for of in (labels, implicit)])
    correlation = float(correlations(both)[0, 1])
    return [
        *(
            (f"mean implicit reward of the policy, {side}", f"{implicit[side].mean(dtype=np.float64):+.4f}")
            for side in SIDES
        ),
        ("its correlation with the labels", shown_correlation(correlation)),
    ]


def _page_pair(
    number: int, pair: LabelledPair, decode: Callable[[list[int]], str], policy: dict[str, np.ndarray] | None
) -> dict[str, Any]:
    sides = {}
    for side in SIDES:
        rewards, logprobs = (getattr(pair, f"{side}_{name}") for name in ("token_rewards", "ref_logprobs"))
        ids = getattr(pair, f"{side}_tokens").tolist()
        sides[side] = {
            "tokens": token_texts(ids[-len(rewards) :], decode),
            "rewards": _rounded(shown_rewards(rewards)),
            "logprobs": None if logprobs is None else _rounded(logprobs),
            "policy": None if policy is None else _rounded(policy[side]),
            "score": getattr(pair, f"{side}_score"),
        }
    prompt = pair.prompt if pair.prompt is not None else decode(ids[: -len(rewards)])
    return {"number": number, "id": pair.pair_id, "prompt": prompt, **sides}


def shown_rewards(token_rewards: np.ndarray) -> np.ndarray:
    """Token rewards with 0 for tokens that are not scored, [n] fp32."""
    return np.where(is_scored(token_rewards), token_rewards, np.float32(0))


def _scored(values: Sequence[Any], scored: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [of[mask] for of, mask in zip(values, scored, strict=True) if of is not None]


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]


def _in_terminal(text: str, reward: float) -> str:
    strength = min(abs(reward) / 0.5, 1) ** 0.5
    full = (230, 97, 1) if reward < 0 else (33, 102, 172)
    background = ";".join(str(round(255 - strength * 0.75 * (255 - channel))) for channel in full)
    return f"\x1b[30;48;2;{background}m{text}\x1b[0m"
