"""Judges: the interface :class:`Judge`, and one module per kind."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from treg_megatron.errors import UserError


@dataclass(frozen=True)
class Pair:
    """A prompt and the answers of both sides to it.

    Attributes:
        messages: the conversation as given; of a prompt of several turns, the user's turns.
        arm, baseline: one answer per turn.
        category, dataset: of the prompt, where the benchmark names them.
    """

    prompt_id: str
    messages: list[dict[str, str]]
    arm: list[str]
    baseline: list[str]
    category: str | None
    dataset: str | None

    @property
    def question(self) -> str:
        """The prompt, for judges that read a single user message.

        Raises:
            UserError: it is more than that.
        """
        if len(self.messages) != 1 or self.messages[0]["role"] != "user":
            raise UserError(
                f"prompt {self.prompt_id} has {len(self.messages)} messages, and this judge reads single messages of "
                "a user; choose a reward model or a function (judge.kind)"
            )
        return self.messages[0]["content"]


class Judge(Protocol):
    """What prefers one answer to another; a context manager that holds what it needs only while it is open."""

    def identity(self) -> dict[str, Any]:
        """``kind``, ``name`` and every setting that decides judgments; available before it is opened."""
        ...

    def require_readable(self, pairs: Sequence[Pair]) -> None:
        """Check, before anything is paid for, that every prompt is of the form that the judge reads.

        Raises:
            UserError: one is not.
        """
        ...

    def __enter__(self) -> "Judge": ...

    def __exit__(self, *_: object) -> None: ...

    def judgments(self, pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
        """One row per pair, in order, as :class:`~treg_megatron.evaluation.judgment_folder.Judgments` has them.

        Raises:
            UserError: the judge cannot go on.
        """
        ...

    def files(self, pairs: Sequence[Pair], rows: Sequence[dict[str, Any]]) -> dict[str, str]:
        """The same judgments in the form of the benchmark's own tools: texts by relative path."""
        ...
