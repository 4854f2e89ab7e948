"""What a verifier is: it turns a finished trajectory's answer into a reward.

Shaping by length or by tool calls is not a verifier's business; it is added to its reward.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class RewardResult:
    """A verdict.

    Attributes:
        reward: the number that enters the group advantages.
        is_correct: whether the answer counts as right in accuracies.
        prediction: the answer as it was extracted; empty where there was none.
        parts: named numbers for the logs.
    """

    reward: float
    is_correct: bool
    prediction: str
    parts: dict[str, float] = field(default_factory=dict)


class Verifier(Protocol):
    """Scores one response."""

    def score(
        self, response_text: str, ground_truth: str, extra_info: Mapping[str, object]
    ) -> RewardResult:
        """Score a response.

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
