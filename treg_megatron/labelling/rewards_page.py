"""Reports on labelled pairs: statistics of label quality, an HTML page, and text for the terminal."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from treg_megatron.data.labelled_pairs import SIDES, LabelledPair
from treg_megatron.data.scored import is_scored
from treg_megatron.labelling.contrastive import contrastive_rewards
from treg_megatron.labelling.scoring import Scorer, sequences_of
from treg_megatron.utils.files import atomic_write
from treg_megatron.utils.terminal import without_control_bytes

TEMPLATE = Path(__file__).resolve().parent / "pages" / "rewards.html"
ALPHAS = (0.1, 0.25, 0.5)  # the paper's search
MERE_COPYING = 0.02  # mean |r| below which the reference model does not distinguish better from worse
NEAR_ZERO = 0.01

_COPYING_WARNING = (
    "The rewards are near 0 (mean size {:.4f}): the reference model gives the response nearly the same probability "
    "under both prompts. Small models do this with `revise`, which shows them the response to copy. Training on these "
    "labels is close to plain preference optimization; try the prompt pair few_shot or answer, or a larger reference "
    "model."
)
_CONTRARY_WARNING = (
    "Chosen responses have a lower mean reward ({:+.4f}) than rejected ones ({:+.4f}): the token rewards contradict "
    "the preferences. Look at the pairs, and try another prompt pair, before you train on them."
)


class Factors(NamedTuple):
    """How alpha distributes the gradient: factors 1 + alpha r_t of chosen tokens, 1 - alpha r_t of rejected ones.

    Attributes:
        alpha: objective.alpha.
        low, high: 5th and 95th percentile of the factors.
        beyond_tenth: fraction of the tokens whose factor is more than 0.1 away from 1.
    """

    alpha: float
    low: float
    high: float
    beyond_tenth: float


@dataclass(frozen=True)
class Quality:
    """Statistics over all response tokens of labelled pairs. A correlation with a constant column is nan."""

    pairs: int
    tokens: int
    mean_abs: float
    near_zero: float
    half_of_mass: float  # smallest fraction of the tokens that holds half of the rewards' total size
    chosen_mean: float
    rejected_mean: float
    chosen_above: float  # fraction of pairs whose chosen response has the higher mean reward
    with_surprisal: float  # Pearson's correlation of a token's reward with its surprisal under x
    with_position: float  # with its position in the response
    with_length: float  # between a response's mean reward and its length
    factors: tuple[Factors, ...]  # for each of ALPHAS

    @property
    def warnings(self) -> list[str]:
        """What the figures warn of, one paragraph each."""
        warnings = []
        if self.mean_abs < MERE_COPYING:
            warnings.append(_COPYING_WARNING.format(self.mean_abs))
        if self.chosen_mean < self.rejected_mean and self.chosen_above < 0.5:
            warnings.append(_CONTRARY_WARNING.format(self.chosen_mean, self.rejected_mean))
        return warnings

    def lines(self) -> list[tuple[str, str]]:
        """Name and formatted value of each figure."""
        return [
            ("pairs", f"{self.pairs:,}"),
            ("response tokens", f"{self.tokens:,}"),
            ("mean size of a reward", f"{self.mean_abs:.4f}"),
            (f"share within ±{NEAR_ZERO}", f"{self.near_zero:.1%}"),
            ("share that holds half of their total size", _share(self.half_of_mass)),
            ("mean reward, chosen", f"{self.chosen_mean:+.4f}"),
            ("mean reward, rejected", f"{self.rejected_mean:+.4f}"),
            ("pairs whose chosen response has the higher mean", f"{self.chosen_above:.1%}"),
            ("correlation with surprisal", _shown(self.with_surprisal)),
            ("correlation with position", _shown(self.with_position)),
            ("correlation of a response's mean with its length", _shown(self.with_length)),
            *(
                (
                    f"a token's gradient at alpha {factors.alpha:g}",
                    f"90 % of the factors in {factors.low:.3f} to {factors.high:.3f}, {factors.beyond_tenth:.1%} of "
                    "them more than 0.1 from 1",
                )
                for factors in self.factors
            ),
        ]


def quality(pairs: Sequence[LabelledPair]) -> Quality:
    """The statistics of one or more labelled pairs."""
    scored = {side: [is_scored(getattr(pair, f"{side}_token_rewards")) for pair in pairs] for side in SIDES}
    rewards = {side: _scored([getattr(p, f"{side}_token_rewards") for p in pairs], scored[side]) for side in SIDES}
    responses = rewards["chosen"] + rewards["rejected"]
    flat = np.concatenate(responses).astype(np.float64)
    means = {side: np.array([values.mean(dtype=np.float64) for values in rewards[side]]) for side in SIDES}
    known = all(pair.chosen_ref_logprobs is not None for pair in pairs)
    surprisal = [
        values
        for side in SIDES
        for values in _scored([getattr(pair, f"{side}_ref_logprobs") for pair in pairs], scored[side])
        if known
    ]
    return Quality(
        len(pairs),
        len(flat),
        float(np.abs(flat).mean()),
        float((np.abs(flat) < NEAR_ZERO).mean()),
        _half_of_mass(np.abs(flat)),
        *(float(np.concatenate(rewards[side]).mean(dtype=np.float64)) for side in SIDES),
        float((means["chosen"] > means["rejected"]).mean()),
        _correlation(flat, -np.concatenate(surprisal)) if known else float("nan"),
        _correlation(flat, np.concatenate([np.flatnonzero(s) for side in SIDES for s in scored[side]])),
        _correlation(np.concatenate([means["chosen"], means["rejected"]]), np.array([len(r) for r in responses])),
        _factors(np.concatenate([*rewards["chosen"], *(-values for values in rewards["rejected"])]).astype(np.float64)),
    )


def _half_of_mass(sizes: np.ndarray) -> float:
    mass = np.cumsum(np.sort(sizes)[::-1])
    return float((np.searchsorted(mass, mass[-1] / 2) + 1) / len(sizes)) if mass[-1] else float("nan")


def _factors(favoured: np.ndarray) -> tuple[Factors, ...]:
    """For rewards with the sign by which they strengthen a token's gradient: r_t chosen, -r_t rejected."""
    low, high = np.quantile(favoured, [0.05, 0.95])
    return tuple(
        Factors(alpha, float(1 + alpha * low), float(1 + alpha * high), float((alpha * np.abs(favoured) > 0.1).mean()))
        for alpha in ALPHAS
    )


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
    figures: Quality,
    pairs: Sequence[LabelledPair],
    decode: Callable[[list[int]], str],
    policy: Sequence[dict[str, np.ndarray]] | None = None,
) -> None:
    """Write one self-contained HTML file.

    Args:
        path: the file to write.
        source: one line that says what is shown.
        figures: statistics of all labelled pairs.
        pairs: the pairs to show.
        decode: token ids to text.
        policy: :func:`policy_rewards` of ``pairs``.
    """
    summary = figures.lines() + (_policy_lines(pairs, policy) if policy else [])
    content = {
        "source": source,
        "warnings": figures.warnings,
        "summary": summary,
        "pairs": [
            _page_pair(number, pair, decode, policy[number] if policy else None) for number, pair in enumerate(pairs)
        ],
    }
    # a `<` in a text could end the script element
    data = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    with atomic_write(path) as partial:
        partial.write_text(TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", data), encoding="utf-8")


def text_report(
    figures: Quality,
    pairs: Sequence[LabelledPair],
    decode: Callable[[list[int]], str],
    colour: bool,
    policy: Sequence[dict[str, np.ndarray]] | None = None,
) -> Iterator[str]:
    """The same report for a terminal, line by line; tokens are shaded with ``colour``, else followed by rewards."""
    summary = figures.lines() + (_policy_lines(pairs, policy) if policy else [])
    width = max(len(name) for name, _ in summary)
    yield from (f"{name:{width}}  {value}" for name, value in summary)
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


def _policy_lines(pairs: Sequence[LabelledPair], policy: Sequence[dict[str, np.ndarray]]) -> list[tuple[str, str]]:
    """How the policy's implicit rewards relate to the labels, over the pairs shown."""
    scored = {side: [is_scored(getattr(pair, f"{side}_token_rewards")) for pair in pairs] for side in SIDES}
    given = {side: [getattr(pair, f"{side}_token_rewards") for pair in pairs] for side in SIDES}
    labels = {side: np.concatenate(_scored(given[side], scored[side])) for side in SIDES}
    implicit = {side: np.concatenate(_scored([p[side] for p in policy], scored[side])) for side in SIDES}
    correlation = _correlation(*(np.concatenate([of[side] for side in SIDES]) for of in (labels, implicit)))
    return [
        *(
            (f"mean implicit reward of the policy, {side}", f"{implicit[side].mean(dtype=np.float64):+.4f}")
            for side in SIDES
        ),
        ("its correlation with the labels", _shown(correlation)),
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


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    if first.std() == 0 or second.std() == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def _share(fraction: float) -> str:
    return "unknown" if np.isnan(fraction) else f"{fraction:.1%}"


def _shown(correlation: float) -> str:
    return "unknown" if np.isnan(correlation) else f"{correlation:+.2f}"


def _in_terminal(text: str, reward: float) -> str:
    strength = min(abs(reward) / 0.5, 1) ** 0.5
    full = (230, 97, 1) if reward < 0 else (33, 102, 172)
    background = ";".join(str(round(255 - strength * 0.75 * (255 - channel))) for channel in full)
    return f"\x1b[30;48;2;{background}m{text}\x1b[0m"
