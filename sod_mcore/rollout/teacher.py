"""Which model scores a trajectory, and what it is told that the student is not.

With privileged information (OPSD, arXiv 2601.18734) the teacher may be the student itself: its own
weights, told the answer, judge the tokens that it sampled without it. The teacher's prompt is then
another one; the response, observations included, is the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sod_mcore.chat import ChatRenderer
from sod_mcore.config import TeacherConfig
from sod_mcore.serving.client.engine_client import EngineClient
from sod_mcore.serving.client.scoring import Scores, score
from sod_mcore.trajectory import Message, Prompt, Trajectory

DEFAULT_TEXTS = {
    "ground_truth": (
        "\n\nThe correct answer to this is known:\n{ground_truth}\n"
        "Do not quote it. Work as if you had to find it yourself, with the same tools, and arrive "
        "at it by steps of your own."
    ),
    "hint": "\n\nA hint that may help:\n{hint}",
}
"""What follows the user's last message in the teacher's prompt."""


def teacher_model(config: TeacherConfig, data_source: str) -> str:
    """Name of the served model that scores trajectories of a source."""
    if config.weights == "live":
        return "student"
    fitting = [prefix for prefix in config.by_source if data_source.startswith(prefix)]
    return config.by_source[max(fitting, key=len)] if fitting else "teacher"


def teacher_messages(config: TeacherConfig, prompt: Prompt) -> tuple[Message, ...]:
    """The conversation that the teacher's prompt is rendered from.

    Raises:
        ValueError: the row has no hint, or no message of the user's to put anything behind.
    """
    if config.privileged == "none":
        return prompt.messages
    template = config.privileged_text or DEFAULT_TEXTS[config.privileged]
    text = template.replace(f"{{{config.privileged}}}", _privileged_text(config, prompt))
    users = [i for i, message in enumerate(prompt.messages) if message["role"] == "user"]
    if not users:
        raise ValueError(f"{prompt.prompt_id} has no message of the user's; the teacher needs one")
    told = {**prompt.messages[users[-1]]}
    told["content"] = f"{told['content']}{text}"
    return (*prompt.messages[: users[-1]], told, *prompt.messages[users[-1] + 1 :])


def _privileged_text(config: TeacherConfig, prompt: Prompt) -> str:
    if config.privileged == "ground_truth":
        return _cut(prompt.ground_truth, config.privileged_max_characters)
    hint = prompt.extra_info.get("hint")
    if not isinstance(hint, str) or not hint:
        raise ValueError(
            f"{prompt.prompt_id}: extra_info.hint is {hint!r}; teacher.privileged=hint needs a "
            "text there in every row"
        )
    return _cut(hint, config.privileged_max_characters)


def _cut(text: str, max_characters: int) -> str:
    return text if len(text) <= max_characters else f"{text[:max_characters]} [...]"


@dataclass(frozen=True)
class TeacherScorer:
    """Scores finished trajectories.

    Attributes:
        client: an open client.
        renderer: the student's; teacher and student share their tokenizer.
        tool_schemas: as the student's prompt shows them.
        top_k: likeliest tokens returned for each position; 0 for none.
    """

    config: TeacherConfig
    client: EngineClient
    renderer: ChatRenderer
    tool_schemas: Sequence[dict[str, Any]]
    top_k: int

    async def __call__(
        self,
        prompt: Prompt,
        trajectory: Trajectory,
        in_flight: AbstractContextManager[None] | None = None,
    ) -> Trajectory:
        """The trajectory with the teacher's log-probs of its response.

        ``in_flight`` is held while the engine is asked.

        Raises:
            ScoringError: the answer is about other tokens, or a value is not finite.
            EngineError: the engine did not answer.
        """
        teacher_prompt = self._prompt_ids(prompt, trajectory)
        response = trajectory.token_ids[trajectory.prompt_length :]
        scores = await score(
            self.client,
            teacher_model(self.config, trajectory.data_source),
            np.concatenate([teacher_prompt, response]),
            len(teacher_prompt),
            top_k=self.top_k,
            in_flight=in_flight,
        )
        placed = behind_prompt(scores, len(teacher_prompt), trajectory.prompt_length)
        return trajectory.with_teacher(placed.logprobs, placed.topk_ids, placed.topk_logprobs)

    def _prompt_ids(self, prompt: Prompt, trajectory: Trajectory) -> NDArray[np.int32]:
        if self.config.privileged == "none":
            return trajectory.token_ids[: trajectory.prompt_length]
        messages = teacher_messages(self.config, prompt)
        return self.renderer.render_prompt(messages, self.tool_schemas)


def behind_prompt(scores: Scores, scored_prompt_length: int, prompt_length: int) -> Scores:
    """Scores of a response, moved from behind one prompt to behind another.

    Args:
        scores: of ``[P' + R]`` tokens, whose first ``scored_prompt_length`` = P' were a prompt.
        prompt_length: P; the result is about ``[P + R]`` tokens.
    """
    if scored_prompt_length == prompt_length:
        return scores

    def moved(values: NDArray[Any], absent: float) -> NDArray[Any]:
        response = values[scored_prompt_length:]
        head = np.full((prompt_length, *values.shape[1:]), absent, values.dtype)
        return np.concatenate([head, response])

    if scores.topk_ids is None or scores.topk_logprobs is None:
        return Scores(moved(scores.logprobs, np.nan))
    return Scores(
        moved(scores.logprobs, np.nan),
        moved(scores.topk_ids, -1),
        moved(scores.topk_logprobs, np.nan),
    )
