"""What a grader and a verifier are: they turn a finished trajectory's answer into a verdict.

A **grader** is a pure function of texts. It may be slow or hang on hostile answers, so it runs in a
process of its own with a time limit (``pool.py``). A **verifier** is what the rollout awaits: a
grader in that pool, or something that runs programs in a sandbox. Shaping by length or by tool
calls is neither's business; it is added afterwards (``shaping.py``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

Category = Literal["right", "wrong", "no_answer", "bad_format", "timeout"]
"""What is the matter with an answer. "no_answer": nothing that looks like one; "bad_format": one
that cannot be read as what was asked for; "timeout": the grader took too long over it. What is
broken outside the answer is no category but an ``InfrastructureError``."""


class VerdictError(ValueError):
    """A grader made a verdict that is none."""


@dataclass(frozen=True)
class Verdict:
    """What a grader found.

    Attributes:
        category: see above; only "right" counts in accuracies.
        prediction: the answer as it was extracted; empty where there was none.
        share: from 0 to 1, the share of tests passed, where the reward is to be that share; None
            where there is only right and wrong.
        parts: named numbers for the logs.

    Raises:
        VerdictError: there is no such category, or the share is no number from 0 to 1.
    """

    category: Category
    prediction: str = ""
    share: float | None = None
    parts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what would silently become a wrong reward."""
        categories = get_args(Category)
        if self.category not in categories:
            raise VerdictError(
                f"Verdict: category = {self.category!r}: give one of {', '.join(categories)}"
            )
        share = as_plain_number(self.share)
        is_number = isinstance(share, (int, float)) and 0.0 <= share <= 1.0
        if share is not None and not is_number:
            raise VerdictError(
                f"Verdict: share = {self.share!r}: give a number from 0 to 1, or None"
            )
        object.__setattr__(self, "share", share)


def as_plain_number(value: object) -> object:
    """Python's number for a NumPy or torch scalar; anything else as it is."""
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", None) == 0 else value


@dataclass(frozen=True)
class RewardResult:
    """A verdict and its reward.

    Attributes:
        reward: the number that enters the group advantages.
        category: the grader's.
        prediction: the answer as it was extracted; empty where there was none.
        parts: named numbers for the logs.
    """

    reward: float
    category: Category
    prediction: str
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def is_correct(self) -> bool:
        """Whether the answer counts as right in accuracies."""
        return self.category == "right"


Grader = Callable[[str, str, Mapping[str, object]], Verdict]
"""``grader(response_text, ground_truth, extra_info)``; see :meth:`Verifier.verify`. A module-level
function or a picklable object, so that it can run in another process."""


class Verifier(Protocol):
    """Judges one response."""

    async def verify(
        self, response_text: str, ground_truth: str, extra_info: Mapping[str, object]
    ) -> Verdict:
        """Judge a response.

        Args:
            response_text: text of the final assistant turn, without special tokens. Earlier turns
                and observations are not in it: a tool that prints a boxed number answers nothing.
            ground_truth: the right answer, as the data row has it.
            extra_info: further fields of the data row.

        Raises:
            ValueError: the data row is unusable; never because of the response.
            sod_mcore.tools.InfrastructureError: what the verifier runs on is broken.
        """
        ...


@dataclass(frozen=True)
class RewardScale:
    """Rewards of right and wrong answers; a share of passed tests lies between 0 and ``correct``,
    whatever ``wrong`` is, as in the reference (sod: code scores in [0, 1], no program -1)."""

    correct: float = 1.0
    wrong: float = -1.0

    def result(self, verdict: Verdict) -> RewardResult:
        """The verdict with its reward."""
        reward = self.correct if verdict.category == "right" else self.wrong
        if verdict.share is not None:
            reward = verdict.share * self.correct
        return RewardResult(reward, verdict.category, verdict.prediction, dict(verdict.parts))
