"""A teacher over HTTP that fails in one way after the other, and what the pool process makes of it.

Student, conversations, verifiers and the client are the real ones of a run; only the engines are
scripted. Whatever the teacher does, no token gets a score that is not its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from sod_mcore.rollout.episode import Sampling
from sod_mcore.rollout.process_pool import ProcessPool
from sod_mcore.rollout.request import RolloutRequest, RolloutResult
from sod_mcore.serving.client.counters import ClientCounters
from sod_mcore.trajectory import Prompt
from tests.rollout.scripted_engine import QUESTION, ScriptedEngine, serve, settings

SAMPLES = 4
REQUEST_SECONDS = 8.0
"""``serving.request_timeout_seconds`` of these pools."""
SLOW_SECONDS = 2.0
PATIENCE = 120.0

Scores = dict[str, Any]
Answer = Callable[[web.Request, Scores], Awaitable[web.StreamResponse]]
"""Answers a request, given what a good teacher would say."""


def logprob(token: int) -> float:
    """Of each token its own, so that a score of another token is seen."""
    return -(token % 97) / 8


class FaultyTeacher(ScriptedEngine):
    """Scores well, but for the next answers, which a test sets.

    Attributes:
        faults: the next answers, the first one first.
        num_scored: requests that were answered well.
        ill_until: number of questions for its health after which it is well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[Answer] = []
        self.num_scored = 0
        self.health_checks = 0
        self.ill_until = 0

    async def generate(self, request: web.Request) -> web.StreamResponse:  # type: ignore[override]
        body = await request.json()
        ids = body["input_ids"][body["logprob_start_len"] :]
        entries = [[None, ids[0], None], *([logprob(token), token, None] for token in ids[1:])]
        scores = {"meta_info": {"input_token_logprobs": entries}}
        if self.faults:
            return await self.faults.pop(0)(request, scores)
        self.num_scored += 1
        return web.json_response(scores)

    async def health(self, request: web.Request) -> web.Response:
        self.health_checks += 1
        return web.Response(status=200 if self.health_checks > self.ill_until else 503)


async def slow(request: web.Request, scores: Scores) -> web.StreamResponse:
    await asyncio.sleep(SLOW_SECONDS)
    return web.json_response(scores)


async def too_slow(request: web.Request, scores: Scores) -> web.StreamResponse:
    await asyncio.sleep(10 * REQUEST_SECONDS)
    return web.json_response(scores)


async def garbage(request: web.Request, scores: Scores) -> web.StreamResponse:
    return web.Response(body=b"\x00\xff garbage", content_type="application/json")


async def another_document(request: web.Request, scores: Scores) -> web.StreamResponse:
    return web.json_response(["no", "scores"])


async def error_500(request: web.Request, scores: Scores) -> web.StreamResponse:
    return web.Response(status=500, text="CUDA error")


async def cut_off(request: web.Request, scores: Scores) -> web.StreamResponse:
    """Half of a good answer, then the connection is closed."""
    response = web.StreamResponse(headers={"Content-Length": "100000"})
    await response.prepare(request)
    await response.write(b'{"meta_info": {"input_token_logprobs": [[null, 1, null], [-0.5, ')
    assert request.transport is not None
    request.transport.abort()
    return response


async def without_scores(request: web.Request, scores: Scores) -> web.StreamResponse:
    return web.json_response({"meta_info": {}})


async def too_few(request: web.Request, scores: Scores) -> web.StreamResponse:
    scores["meta_info"]["input_token_logprobs"].pop()
    return web.json_response(scores)


async def other_tokens(request: web.Request, scores: Scores) -> web.StreamResponse:
    """The right number of scores, each for the token before."""
    entries = scores["meta_info"]["input_token_logprobs"]
    scores["meta_info"]["input_token_logprobs"] = [entries[0], *entries[:-1]]
    return web.json_response(scores)


async def not_a_number(request: web.Request, scores: Scores) -> web.StreamResponse:
    """As SGLang sends it: JSON has no NaN, so that its encoder writes null."""
    scores["meta_info"]["input_token_logprobs"][2][0] = None
    return web.json_response(scores)


async def literal_nan(request: web.Request, scores: Scores) -> web.StreamResponse:
    """As Python's own encoder writes it, which is no JSON."""
    scores["meta_info"]["input_token_logprobs"][2][0] = float("nan")
    return web.json_response(scores)


@dataclass(frozen=True)
class Served:
    """A pool with its teacher; batches are played one after the other."""

    pool: ProcessPool
    teacher: FaultyTeacher

    def play(self, *faults: Answer, ill_for: int = 0) -> tuple[RolloutResult, ClientCounters]:
        """A batch whose first scoring requests are answered with ``faults``, and what the client
        counted of the teacher meanwhile.

        Args:
            ill_for: questions for its health that the teacher denies.
        """
        before = self.pool.counters.get("teacher", ClientCounters())
        self.teacher.faults[:] = faults
        self.teacher.health_checks, self.teacher.ill_until = 0, ill_for
        prompt = Prompt((QUESTION,), "5", "sums", "p0")
        request = RolloutRequest((prompt,), SAMPLES, Sampling(1.0, 1.0), with_teacher=True)
        result = self.pool.collect(self.pool.submit(request), PATIENCE)
        assert not self.teacher.faults
        now = asdict(self.pool.counters["teacher"])
        added = {name: value - asdict(before)[name] for name, value in now.items()}
        return result, ClientCounters(**added)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("teacher")
    teacher = FaultyTeacher()
    with serve(ScriptedEngine(turn_seconds=0.0)) as student_url, serve(teacher) as teacher_url:
        timeout = {"request_timeout_seconds": REQUEST_SECONDS}
        with ProcessPool(settings(folder, student_url, 64, teacher_url, **timeout)) as pool:
            yield Served(pool, teacher)


def assert_right(result: RolloutResult, num_unscored: int = 0) -> None:
    """Every conversation is there with its reward, and what is scored is scored right."""
    assert (len(result.trajectories), result.num_dropped) == (SAMPLES, 0)
    assert [t.reward for t in result.trajectories] == [1.0] * SAMPLES
    assert result.num_unscored == num_unscored
    assert sum(not t.is_scored for t in result.trajectories) == num_unscored
    for trajectory in result.trajectories:
        scores = trajectory.teacher_logprobs[trajectory.prompt_length :]
        if trajectory.is_scored:
            response = trajectory.token_ids[trajectory.prompt_length :]
            np.testing.assert_array_equal(scores, [logprob(int(token)) for token in response])
        else:
            assert np.isnan(scores).all(), "never zeros, nor a part"


def test_a_teacher_that_answers_slowly_is_waited_for(served: Served) -> None:
    result, counted = served.play(slow, slow)
    assert_right(result)
    assert (result.num_retries, result.failures) == (0, ())
    assert counted == ClientCounters(requests=SAMPLES)


def test_an_answer_that_never_comes_is_asked_for_again(served: Served) -> None:
    """For the same conversation, once the teacher says that it is well."""
    result, counted = served.play(too_slow)
    assert_right(result)
    assert result.num_retries == 0
    (failure,) = result.failures
    assert failure.startswith(f"EngineError: teacher: no answer within {REQUEST_SECONDS:g} s")
    assert (counted.requests, counted.timeouts) == (SAMPLES + 1, 1)
    assert len(served.teacher.aborted) >= 1


@pytest.mark.parametrize(
    ("fault", "counter"),
    [
        (garbage, "bad_answers"),
        (another_document, "bad_answers"),
        (literal_nan, "bad_answers"),
        (error_500, "bad_answers"),
        (cut_off, "connection_failures"),
    ],
)
def test_what_is_no_answer_is_asked_for_again(served: Served, fault: Answer, counter: str) -> None:
    """The same conversation is scored by a later try; nothing of it is lost."""
    result, counted = served.play(fault)
    assert_right(result)
    assert (result.num_retries, result.failures) == (0, ())
    assert (counted.requests, counted.retries, getattr(counted, counter)) == (SAMPLES, 1, 1)


def test_a_teacher_that_is_ill_for_a_while_is_waited_for(served: Served) -> None:
    result, counted = served.play(*[error_500] * SAMPLES, ill_for=4)
    assert_right(result)
    assert result.num_retries == 0
    assert counted.requests == SAMPLES
    assert counted.bad_answers == counted.retries == SAMPLES
    assert counted.seconds_waited > 0
    assert served.teacher.health_checks > 4


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (without_scores, "the answer cannot be read: KeyError('input_token_logprobs')"),
        (too_few, "scores came back for"),
        (other_tokens, "is about token"),
        (not_a_number, "a log-prob is not finite"),
    ],
)
def test_an_answer_that_cannot_be_trusted_leaves_the_trajectory_unscored(
    served: Served, fault: Answer, said: str
) -> None:
    """It keeps its reward, and is not asked for again: the engine would say the same."""
    result, counted = served.play(fault)
    assert_right(result, num_unscored=1)
    assert result.num_retries == 0
    (failure,) = result.failures
    assert failure.startswith("ScoringError: ")
    assert said in failure
    assert counted == ClientCounters(requests=SAMPLES)
