"""Which model scores, what it reads, and where its scores come to stand."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sod_mcore.chat import ChatRenderer
from sod_mcore.config import TeacherConfig
from sod_mcore.rollout.teacher import (
    TeacherScorer,
    behind_prompt,
    teacher_messages,
    teacher_model,
)
from sod_mcore.rollout.token_recorder import TokenRecorder
from sod_mcore.serving.client.replicas import Affinity
from sod_mcore.serving.client.scoring import Scores
from sod_mcore.serving.endpoints import Endpoints, ModelEndpoints
from sod_mcore.tools import code_interpreter_schema
from sod_mcore.trajectory import Prompt, Trajectory
from tests.end_to_end.programs import TEACHER

PROMPT = Prompt(
    messages=(
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "well"},
        {"role": "user", "content": "Calculate 2 + 3."},
    ),
    ground_truth=r"\frac{1}{2}",
    data_source="train-math-x",
    prompt_id="p",
    extra_info={"hint": "count"},
)


@pytest.mark.parametrize(
    ("source", "name"),
    [("train-code-taco-1", "coder"), ("train-code-x", "generalist"), ("math_dapo", "teacher")],
)
def test_the_longest_prefix_chooses_the_teacher(source: str, name: str) -> None:
    config = TeacherConfig(by_source={"train-code-": "generalist", "train-code-taco": "coder"})
    assert teacher_model(config, source) == name


def test_live_weights_are_the_students() -> None:
    config = TeacherConfig(weights="live", privileged="ground_truth")
    assert teacher_model(config, "anything") == "student"


def test_nothing_privileged_leaves_the_messages() -> None:
    assert teacher_messages(TeacherConfig(), PROMPT) == PROMPT.messages


@pytest.mark.parametrize(("kind", "known"), [("ground_truth", r"\frac{1}{2}"), ("hint", "count")])
def test_the_last_message_of_the_user_is_told_more(kind: Any, known: str) -> None:
    told = teacher_messages(TeacherConfig(privileged=kind), PROMPT)
    assert told[:2] == PROMPT.messages[:2]
    assert told[2]["content"].startswith("Calculate 2 + 3.\n")
    assert known in told[2]["content"]
    assert f"{{{kind}}}" not in told[2]["content"]
    assert PROMPT.messages[2]["content"] == "Calculate 2 + 3."


def test_words_of_ones_own() -> None:
    config = TeacherConfig(privileged="ground_truth", privileged_text=" = {ground_truth} {x}")
    assert teacher_messages(config, PROMPT)[2]["content"] == r"Calculate 2 + 3. = \frac{1}{2} {x}"


def test_the_rest_of_a_long_text_is_left_out() -> None:
    prompt = Prompt(PROMPT.messages, "0123456789", "s", "p")
    config = TeacherConfig(
        privileged="ground_truth", privileged_text=":{ground_truth}", privileged_max_characters=4
    )
    assert teacher_messages(config, prompt)[2]["content"].endswith(":0123 [...]")


@pytest.mark.parametrize("hint", [None, "", 3])
def test_a_row_without_hint_is_refused(hint: object) -> None:
    prompt = Prompt(PROMPT.messages, "1", "s", "rows/7", {"hint": hint})
    with pytest.raises(ValueError, match=r"rows/7: extra_info.hint is .* needs a text"):
        teacher_messages(TeacherConfig(privileged="hint"), prompt)


def test_scores_move_behind_another_prompt() -> None:
    ids = np.arange(12, dtype=np.int32).reshape(6, 2)
    scores = Scores(np.arange(6, dtype=np.float32), ids, ids.astype(np.float32))
    moved = behind_prompt(scores, 4, 1)
    np.testing.assert_array_equal(moved.logprobs, [np.nan, 4, 5])
    assert moved.topk_ids is not None
    assert moved.topk_logprobs is not None
    np.testing.assert_array_equal(moved.topk_ids, [[-1, -1], [8, 9], [10, 11]])
    np.testing.assert_array_equal(moved.topk_logprobs, [[np.nan, np.nan], [8, 9], [10, 11]])
    assert moved.topk_ids.dtype == np.int32
    assert moved.logprobs.dtype == np.float32


class FakeClient:
    """Scores token t by its id / 1000, and remembers what it was asked."""

    def __init__(self) -> None:
        model = ModelEndpoints("teacher", "http://t", ("http://t",), "folder", 512, 5000)
        self.endpoints = Endpoints("http://f", {"teacher": model}, 1, 1, "here")
        self.requests: list[dict[str, Any]] = []

    async def post_generate(
        self,
        model: str,
        request: dict[str, Any],
        *,
        affinity: Affinity,
        in_flight: AbstractContextManager[None] | None = None,
    ) -> dict[str, Any]:
        self.requests.append(request)
        ids = request["input_ids"][request["logprob_start_len"] :]
        entries = [[None, ids[0]], *([-i / 1000, i] for i in ids[1:])]
        return {"meta_info": {"input_token_logprobs": entries}}


def score(config: TeacherConfig) -> tuple[Trajectory, list[int], NDArray[np.int32]]:
    """A trajectory with an observation, scored; the ids sent; the teacher's rendered prompt."""
    renderer = ChatRenderer.from_folder(TEACHER)
    schemas = [code_interpreter_schema()]
    recorder = TokenRecorder(renderer.render_prompt(PROMPT.messages, schemas))
    for turn in ([7, 8], [9]):
        n = len(turn)
        recorder.append_turn(
            np.array(turn, np.int32), np.zeros(n, np.float32), np.zeros(n, np.int32)
        )
        recorder.append_observation(renderer.observation_ids("5"))
    trajectory = recorder.to_trajectory(
        group_id="p", reward=0.0, is_correct=False, data_source=PROMPT.data_source
    )
    client = FakeClient()
    scorer = TeacherScorer(config, client, renderer, schemas, top_k=0)  # type: ignore[arg-type]
    scored = asyncio.run(scorer(PROMPT, trajectory))
    expected_prompt = renderer.render_prompt(teacher_messages(config, PROMPT), schemas)
    return scored, client.requests[0]["input_ids"], expected_prompt


@pytest.mark.parametrize("privileged", ["none", "ground_truth", "hint"])
def test_the_same_response_is_scored_behind_the_teachers_prompt(privileged: Any) -> None:
    scored, sent, teacher_prompt = score(TeacherConfig(privileged=privileged))
    response = scored.token_ids[scored.prompt_length :]
    np.testing.assert_array_equal(sent[: len(teacher_prompt)], teacher_prompt)
    np.testing.assert_array_equal(sent[len(teacher_prompt) :], response)
    assert (len(teacher_prompt) > scored.prompt_length) == (privileged != "none")
    assert np.isnan(scored.teacher_logprobs[: scored.prompt_length]).all()
    np.testing.assert_allclose(
        scored.teacher_logprobs[scored.prompt_length :], -response / 1000, rtol=1e-6
    )
    assert scored.is_scored
