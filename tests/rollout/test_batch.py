"""A batch survives what goes wrong outside the student, and counts it."""

import asyncio
import time

import numpy as np
import pytest

from sod_mcore.config import RolloutConfig
from sod_mcore.rewards import RewardResult
from sod_mcore.rollout.batch import run_batch
from sod_mcore.rollout.episode import Sampling
from sod_mcore.rollout.group import BatchServices, UnusableRowError
from sod_mcore.rollout.lanes import Track
from sod_mcore.rollout.pool import RolloutError, check_losses
from sod_mcore.rollout.request import RolloutProgress, RolloutRequest, RolloutResult
from sod_mcore.rollout.slots import Slots
from sod_mcore.rollout.token_recorder import TokenRecorder
from sod_mcore.tools.interface import InfrastructureError
from sod_mcore.trajectory import Prompt, Trajectory


class UnusableScoreError(Exception):
    """Stands for an answer of the teacher that cannot be used."""


def trajectory_of(prompt: Prompt) -> Trajectory:
    recorder = TokenRecorder(np.array([1], np.int32))
    recorder.append_turn(
        np.array([2], np.int32), np.array([-1.0], np.float32), np.array([0], np.int32)
    )
    return recorder.to_trajectory(group_id=prompt.prompt_id, reward=0.0, is_correct=False)


class Services:
    """Fails as told, by prompt id: {"p1": 2} fails the first two episodes of p1."""

    def __init__(
        self, episode_failures: dict[str, int] | None = None, unscored: tuple[str, ...] = ()
    ) -> None:
        self.failures = dict(episode_failures or {})
        self.unscored = unscored
        self.running = 0
        self.most_running = 0
        self.scoring_started: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.scoring_seconds = 0.0
        self.scoring_running = 0
        self.scoring_failures = 0
        self.reward_errors: list[Exception] = []
        self.ended: dict[str, float] = {}

    async def episode(self, prompt: Prompt, request: RolloutRequest, track: Track) -> Trajectory:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.seconds.get(prompt.prompt_id, 0.001))
            if self.failures.get(prompt.prompt_id, 0) > 0:
                self.failures[prompt.prompt_id] -= 1
                raise InfrastructureError("the sandbox is gone")
        finally:
            self.running -= 1
        self.ended[prompt.prompt_id] = time.monotonic()
        return trajectory_of(prompt)

    async def reward(self, prompt: Prompt, trajectory: Trajectory) -> RewardResult:
        if self.reward_errors:
            raise self.reward_errors.pop()
        return RewardResult(1.0, "right", "4", {"answer": 1.0})

    async def score(self, prompt: Prompt, trajectory: Trajectory, track: Track) -> Trajectory:
        self.scoring_started[trajectory.group_id] = time.monotonic()
        self.scoring_running += 1
        try:
            await asyncio.sleep(self.scoring_seconds)
        finally:
            self.scoring_running -= 1
        if self.scoring_failures > 0:
            self.scoring_failures -= 1
            raise ConnectionError("the teacher is gone")
        if trajectory.group_id in self.unscored:
            raise UnusableScoreError("misaligned")
        scores = np.where(trajectory.loss_mask, -0.5, np.nan).astype(np.float32)
        return trajectory.with_teacher(scores)

    def bound(self) -> BatchServices:
        return BatchServices(self.episode, self.reward, self.score, UnusableScoreError)


def request(prompts: int, samples: int = 2, spare: int = 0) -> RolloutRequest:
    return RolloutRequest(
        tuple(Prompt((), "", "s", f"p{i}") for i in range(prompts + spare)),
        samples,
        Sampling(1.0, 1.0),
        spare_prompts=spare,
    )


def run(services: Services, asked: RolloutRequest, concurrency: int = 8) -> RolloutResult:
    async def work() -> RolloutResult:
        try:
            return await run_batch(
                asked,
                services.bound(),
                slots=Slots(concurrency),
                priority=0,
                attempts=3,
                on_progress=lambda progress: None,
            )
        finally:
            # Here, and not when the loop has ended: that would end whatever was left behind.
            assert (services.running, services.scoring_running) == (0, 0)

    return asyncio.run(work())


def test_groups_come_back_in_prompt_order_with_reward_and_scores() -> None:
    services = Services()
    services.seconds = {"p0": 0.05}
    result = run(services, request(3))
    assert [t.group_id for t in result.trajectories] == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert all(t.is_scored and t.reward == 1.0 and t.is_correct for t in result.trajectories)
    assert {(t.category, t.prediction) for t in result.trajectories} == {("right", "4")}


def test_a_passing_failure_is_retried_and_a_lasting_one_dropped() -> None:
    result = run(Services({"p0": 2, "p1": 100}), request(2, samples=1))
    assert [t.group_id for t in result.trajectories] == ["p0"]
    assert (result.num_dropped, result.num_retries) == (1, 4)
    assert result.failures == ("InfrastructureError: the sandbox is gone",)


def test_an_unscored_trajectory_keeps_its_reward() -> None:
    result = run(Services(unscored=("p1",)), request(2, samples=1))
    scored, unscored = result.trajectories
    assert result.num_unscored == 1
    assert scored.is_scored
    assert not unscored.is_scored
    assert unscored.reward == 1.0


def test_a_failing_teacher_is_asked_again_for_the_same_trajectory() -> None:
    services = Services()
    services.scoring_failures = 2
    result = run(services, request(1, samples=1))
    assert result.trajectories[0].is_scored
    assert (result.num_unscored, result.num_retries) == (0, 0)
    assert result.failures == ("ConnectionError: the teacher is gone",)


def test_a_lasting_failure_of_the_teacher_leaves_the_trajectory_unscored() -> None:
    services = Services()
    services.scoring_failures = 100
    result = run(services, request(1, samples=1))
    assert not result.trajectories[0].is_scored
    assert (result.num_unscored, result.num_dropped, result.num_retries) == (1, 0, 0)
    assert services.scoring_failures == 97, "asked three times, for one conversation"


def test_a_failing_verifier_is_asked_again_for_the_same_trajectory() -> None:
    services = Services()
    services.reward_errors = [InfrastructureError("no sandbox")] * 2
    result = run(services, request(1, samples=1))
    assert (len(result.trajectories), result.num_dropped, result.num_retries) == (1, 0, 0)
    assert result.failures == ("InfrastructureError: no sandbox",)


def test_a_lasting_failure_of_the_verifier_leaves_no_scoring_behind() -> None:
    services = Services()
    services.reward_errors = [InfrastructureError("no sandbox")] * 100
    services.scoring_seconds = 60.0
    result = run(services, request(1, samples=1))
    assert (result.num_dropped, result.num_unscored) == (1, 0)


def test_an_unusable_row_ends_the_batch() -> None:
    services = Services()
    services.reward_errors = [ValueError("the ground truth is empty")]
    services.seconds = {"p1": 60.0}
    with pytest.raises(UnusableRowError, match="p0: the ground truth is empty"):
        run(services, request(2, samples=1))


def test_scoring_starts_while_other_trajectories_still_run() -> None:
    services = Services()
    services.seconds = {"p1": 0.2}
    run(services, request(2, samples=1))
    assert services.scoring_started["p0"] < services.ended["p1"]


def test_concurrency_is_bounded() -> None:
    services = Services()
    run(services, request(10), concurrency=4)
    assert services.most_running == 4


def test_spare_prompts_hold_nobody_up() -> None:
    """The two slow prompts are given up, with what ran for them, and nothing of them counts; nor
    does one that cannot be played, while there are others."""
    services = Services({"p0": 100, "p3": 1})
    services.seconds = {"p1": 60.0, "p4": 60.0}
    result = run(services, request(3, samples=2, spare=3))
    assert [t.group_id for t in result.trajectories] == ["p2", "p2", "p3", "p3", "p5", "p5"]
    assert (result.num_dropped, result.num_retries, result.num_cancelled) == (0, 1, 6)


def test_a_prompt_that_fails_counts_where_no_other_is_left() -> None:
    result = run(Services({"p0": 100, "p1": 100}), request(2, samples=2, spare=1))
    assert [t.group_id for t in result.trajectories] == ["p2", "p2"]
    assert result.num_dropped == 2


def test_an_error_ends_a_batch_with_spare_prompts() -> None:
    services = Services()
    services.reward_errors = [ValueError("the ground truth is empty")]
    services.seconds = {"p1": 60.0}
    with pytest.raises(UnusableRowError):
        run(services, request(1, samples=1, spare=1))


def test_the_last_progress_of_a_batch_with_spare_prompts_is_its_end() -> None:
    seen: list[RolloutProgress] = []
    services = Services()
    services.seconds = {"p1": 60.0}
    batch = run_batch(
        request(2, 2, spare=1),
        services.bound(),
        slots=Slots(8),
        priority=0,
        attempts=1,
        on_progress=seen.append,
    )
    asyncio.run(batch)
    assert seen[-1] == RolloutProgress(finished=4, dropped=0, total=4)


def test_progress_reaches_the_total() -> None:
    seen: list[RolloutProgress] = []
    services = Services({"p0": 100})
    asyncio.run(
        run_batch(
            request(2, 1),
            services.bound(),
            slots=Slots(1),
            priority=0,
            attempts=1,
            on_progress=seen.append,
        )
    )
    assert seen[-1] == RolloutProgress(finished=1, dropped=1, total=2)


@pytest.mark.parametrize("word", ["dropped", "unscored"])
def test_the_run_stops_when_too_much_is_lost(word: str) -> None:
    def result(count: int) -> RolloutResult:
        dropped, unscored = (count, 0) if word == "dropped" else (0, count)
        return RolloutResult((), dropped, unscored, 0, ("EngineError: refused",))

    config = RolloutConfig(max_dropped_fraction=0.1, max_unscored_fraction=0.1)
    check_losses(result(2), request(20, 1), config)
    with pytest.raises(RolloutError, match=f"3 of 20 trajectories {word}.*refused"):
        check_losses(result(3), request(20, 1), config)
