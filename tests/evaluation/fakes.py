"""Problems, and a pool that answers them at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from sod_mcore.evaluation.data_sets import DataSet
from sod_mcore.rollout.pool import RolloutError, RolloutInterruptedError, Ticket
from sod_mcore.rollout.request import RolloutProgress, RolloutRequest, RolloutResult
from sod_mcore.rollout.token_recorder import TokenRecorder
from sod_mcore.trajectory import Prompt, Trajectory
from tests.rollout.idle_pool import IdlePool


def data_set(name: str, problems: int, sources: Sequence[str] = ("math",)) -> DataSet:
    """Problems whose sources take turns."""
    prompts = [
        Prompt(
            messages=({"role": "user", "content": f"{i}?"},),
            ground_truth=str(i),
            data_source=sources[i % len(sources)],
            prompt_id=f"{name}/{i}",
        )
        for i in range(problems)
    ]
    return DataSet(name, tuple(prompts), digest=f"{name} {problems}")


class FakePool(IdlePool):
    """Answers every prompt rightly; fails or drops as told.

    Args:
        dies_after: requests that are answered before it fails; None for all.
        drops: ids of prompts of which it loses one sample, once.
    """

    def __init__(self, dies_after: int | None = None, drops: Sequence[str] = ()) -> None:
        self.requests: list[RolloutRequest] = []
        self._waiting: dict[Ticket, RolloutRequest] = {}
        self._dies_after = dies_after
        self._drops = set(drops)

    def submit(self, request: RolloutRequest) -> Ticket:
        self.requests.append(request)
        self._waiting[len(self.requests)] = request
        return len(self.requests)

    def collect(
        self,
        ticket: Ticket,
        timeout_seconds: float,
        on_progress: Callable[[RolloutProgress], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> RolloutResult:
        if should_stop():
            raise RolloutInterruptedError
        request = self._waiting.pop(ticket)
        if self._dies_after is not None and len(self.requests) > self._dies_after:
            raise RolloutError("the rollout pool ended with exit code -9")
        trajectories = [
            answered(prompt)
            for prompt in request.prompts
            for _ in range(request.samples_per_prompt - self._loses(prompt))
        ]
        lost = request.num_trajectories - len(trajectories)
        if on_progress is not None:
            for finished in range(1, len(trajectories) + 1):
                on_progress(RolloutProgress(finished, 0, request.num_trajectories))
        return RolloutResult(tuple(trajectories), lost, 0, 0, ("the sandbox is gone",) * bool(lost))

    def _loses(self, prompt: Prompt) -> int:
        if prompt.prompt_id not in self._drops:
            return 0
        self._drops.remove(prompt.prompt_id)
        return 1


class SlowPool(FakePool):
    """Brings nothing until it is asked to stop."""

    was_interrupted = False

    def collect(
        self,
        ticket: Ticket,
        timeout_seconds: float,
        on_progress: Callable[[RolloutProgress], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> RolloutResult:
        deadline = time.monotonic() + 30
        while not should_stop():
            assert time.monotonic() < deadline, "nobody asked it to stop"
            time.sleep(0.01)
        self.was_interrupted = True
        raise RolloutInterruptedError


def answered(prompt: Prompt, *, answer: str | None = None) -> Trajectory:
    """A trajectory of one tool call and an answer."""
    answer = prompt.ground_truth if answer is None else answer
    recorder = TokenRecorder(np.array([1, 2], np.int32))
    recorder.append_turn(
        np.array([3, 4], np.int32), np.array([-1.0, -1.0], np.float32), np.array([0, 0], np.int32)
    )
    return recorder.to_trajectory(
        group_id=prompt.prompt_id,
        reward=1.0,
        is_correct=answer == prompt.ground_truth,
        category="right" if answer == prompt.ground_truth else "wrong",
        prediction=answer,
        tool_succeeded=(True, False),
        data_source=prompt.data_source,
        messages=({"role": "assistant", "content": answer},),
    )
