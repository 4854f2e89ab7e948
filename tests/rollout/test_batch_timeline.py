"""What a batch says that it did when, against services that take a known time.

Sleeps are lower bounds on any machine; upper bounds are loose, or come from what the services
themselves saw.
"""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from sod_mcore.rewards import RewardResult
from sod_mcore.rollout.batch import run_batch
from sod_mcore.rollout.episode import Sampling
from sod_mcore.rollout.group import BatchServices
from sod_mcore.rollout.lanes import Track
from sod_mcore.rollout.request import RolloutRequest, RolloutResult
from sod_mcore.rollout.slots import Slots
from sod_mcore.rollout.token_recorder import TokenRecorder
from sod_mcore.timeline import Span
from sod_mcore.tools.interface import InfrastructureError
from sod_mcore.trajectory import Prompt, Trajectory

Fault = Callable[[str, str], None]
"""Told what was done for which prompt; raises where that is to fail."""


class UnusableScoreError(Exception):
    """Stands for an answer of the teacher that cannot be used."""


@dataclass
class Services:
    """Two turns with a tool call between them; each part takes its seconds, then may fail.

    Attributes:
        under_way: trajectories that have begun to play and are not yet scored.
        most_under_way: the most of them at once.
        began: when each attempt got its slot, in order.
    """

    generate_seconds: float = 0.02
    tool_seconds: float = 0.02
    reward_seconds: float = 0.02
    scoring_seconds: float = 0.02
    fault: Fault = lambda what, prompt_id: None
    under_way: int = 0
    most_under_way: int = 0
    began: list[float] = field(default_factory=list)

    async def episode(self, prompt: Prompt, request: RolloutRequest, track: Track) -> Trajectory:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        self.began.append(time.monotonic())
        try:
            for kind, seconds in (
                ("generate", self.generate_seconds),
                ("tool", self.tool_seconds),
                ("generate", self.generate_seconds),
            ):
                with track.span(kind):  # type: ignore[arg-type]
                    await asyncio.sleep(seconds)
                    self.fault(kind, prompt.prompt_id)
        except BaseException:
            self.under_way -= 1
            raise
        recorder = TokenRecorder(np.array([1], np.int32))
        recorder.append_turn(
            np.array([2], np.int32), np.array([-1.0], np.float32), np.array([0], np.int32)
        )
        return recorder.to_trajectory(group_id=prompt.prompt_id, reward=0.0, is_correct=False)

    async def reward(self, prompt: Prompt, trajectory: Trajectory) -> RewardResult:
        await asyncio.sleep(self.reward_seconds)
        self.fault("reward", prompt.prompt_id)
        return RewardResult(1.0, "right", "4", {})

    async def score(self, prompt: Prompt, trajectory: Trajectory, track: Track) -> Trajectory:
        try:
            with track.span("scoring"):
                await asyncio.sleep(self.scoring_seconds)
                self.fault("scoring", prompt.prompt_id)
        finally:
            self.under_way -= 1
        scores = np.where(trajectory.loss_mask, -0.5, np.nan).astype(np.float32)
        return trajectory.with_teacher(scores)

    def bound(self) -> BatchServices:
        return BatchServices(self.episode, self.reward, self.score, UnusableScoreError)


def request(prompts: int, samples: int = 1, with_teacher: bool = True) -> RolloutRequest:
    asked = tuple(Prompt((), "", "s", f"p{i}") for i in range(prompts))
    return RolloutRequest(asked, samples, Sampling(1.0, 1.0), with_teacher)


async def collect(
    services: BatchServices, asked: RolloutRequest, concurrency: int = 8
) -> RolloutResult:
    return await run_batch(
        asked,
        services,
        slots=Slots(concurrency),
        priority=0,
        attempts=3,
        on_progress=lambda progress: None,
    )


def failing(what: str, *calls: int) -> Fault:
    """A fault in these calls of ``what``, counted from 1."""
    count = 0

    def fault(done: str, prompt_id: str) -> None:
        nonlocal count
        count += done == what
        if done == what and count in calls:
            raise InfrastructureError(what)

    return fault


def kinds(spans: list[Span]) -> Counter[str]:
    return Counter(span.kind for span in spans)


def assert_lanes_do_not_cross(spans: list[Span]) -> None:
    for lane in {span.lane for span in spans}:
        row = sorted((s for s in spans if s.lane == lane), key=lambda s: (s.start, s.end))
        for earlier, later in itertools.pairwise(row):
            assert earlier.end <= later.start, (earlier, later)


def test_one_trajectory_from_its_first_turn_to_its_score() -> None:
    services = Services(0.05, 0.1, 0.02, 0.2)
    before = time.monotonic()
    spans = list(asyncio.run(collect(services.bound(), request(1))).spans)
    after = time.monotonic()
    turn, tool, answer = (span for span in spans if span.kind in ("generate", "tool"))
    (reward,) = (span for span in spans if span.kind == "reward")
    (scoring,) = (span for span in spans if span.kind == "scoring")
    assert kinds(spans) == {"generate": 2, "tool": 1, "reward": 1, "scoring": 1}
    times = [t for span in (turn, tool, answer, scoring) for t in (span.start, span.end)]
    assert [before, *times, after] == sorted([before, *times, after])
    for span, seconds in ((turn, 0.05), (tool, 0.1), (answer, 0.05), (reward, 0.02)):
        assert seconds <= span.end - span.start + 1e-3
    assert reward.start < scoring.end, "the reward does not wait for the teacher"
    assert turn.lane == tool.lane == answer.lane == scoring.lane != reward.lane
    assert {span.label for span in spans} == {"p0"}


def test_the_wait_for_a_slot_is_in_no_span() -> None:
    services = Services()
    spans = list(asyncio.run(collect(services.bound(), request(6), concurrency=1)).spans)
    generated = [span for span in spans if span.kind == "generate"]
    assert len(generated) == 12
    for prompt, began in enumerate(services.began):
        first = min(span.start for span in generated if span.label == f"p{prompt}")
        assert first >= began
    in_order = sorted(generated, key=lambda span: span.start)
    for earlier, later in itertools.pairwise(in_order):
        assert earlier.end <= later.start, "one slot: nothing is generated side by side"


def test_lanes_are_as_many_as_trajectories_under_way() -> None:
    services = Services(scoring_seconds=0.05, reward_seconds=0.001)
    spans = list(asyncio.run(collect(services.bound(), request(20, 2), concurrency=4)).spans)
    assert_lanes_do_not_cross(spans)
    lanes = {span.lane for span in spans}
    assert lanes == set(range(len(lanes)))
    # Each of those that are scored may be rewarded in a lane of its own at the same time.
    rewarded_at_once = max(
        sum(s.start <= span.start < s.end for s in spans if s.kind == "reward") for span in spans
    )
    assert len(lanes) <= services.most_under_way + rewarded_at_once + 1
    assert len(lanes) < 30, "40 trajectories, and few of them at a time"


def test_batches_at_the_same_time_do_not_meet_in_a_lane() -> None:
    async def both() -> list[Span]:
        services = Services().bound()
        results = await asyncio.gather(
            collect(services, request(4)), collect(services, request(4, with_teacher=False))
        )
        return [span for result in results for span in result.spans]

    spans = asyncio.run(both())
    assert kinds(spans) == {"generate": 16, "tool": 8, "reward": 8, "scoring": 4}
    assert_lanes_do_not_cross(spans)


@pytest.mark.parametrize(
    ("what", "calls", "expected"),
    [
        # The second of two prompts' four turns fails: its episode is played again.
        ("generate", (2,), {"generate": 5, "tool": 2, "reward": 2, "scoring": 2}),
        ("tool", (1, 2), {"generate": 6, "tool": 4, "reward": 2, "scoring": 2}),
        # A verifier is asked again about the same trajectory.
        ("reward", (1,), {"generate": 4, "tool": 2, "reward": 3, "scoring": 2}),
    ],
)
def test_what_is_tried_again_is_there_as_often(
    what: str, calls: tuple[int, ...], expected: dict[str, int]
) -> None:
    services = Services(fault=failing(what, *calls))
    result = asyncio.run(collect(services.bound(), request(2)))
    assert (len(result.trajectories), result.num_dropped) == (2, 0)
    assert kinds(list(result.spans)) == expected
    assert_lanes_do_not_cross(list(result.spans))


def test_the_attempts_of_a_dropped_trajectory_are_kept_and_its_lane_is_free_again() -> None:
    def fault(what: str, prompt_id: str) -> None:
        if (what, prompt_id) == ("tool", "p0"):
            raise InfrastructureError(what)

    bound = Services(fault=fault).bound()
    result = asyncio.run(collect(bound, request(2), concurrency=1))
    assert (len(result.trajectories), result.num_dropped) == (1, 1)
    spans = list(result.spans)
    assert kinds(spans) == {"generate": 3 + 2, "tool": 3 + 1, "reward": 1, "scoring": 1}
    assert kinds([s for s in spans if s.label == "p0"]) == {"generate": 3, "tool": 3}
    with bound.lanes.hold() as lane:
        assert lane == 0


def test_scoring_that_is_cancelled_ends_its_span() -> None:
    """The reward fails for good while the teacher would score for a minute."""
    services = Services(scoring_seconds=60.0, fault=failing("reward", *range(1, 100)))
    spans = list(asyncio.run(collect(services.bound(), request(1))).spans)
    assert kinds(spans) == {"generate": 6, "tool": 3, "reward": 9, "scoring": 3}
    assert_lanes_do_not_cross(spans)
    assert all(span.end - span.start < 30 for span in spans)


def test_an_unusable_score_leaves_its_span() -> None:
    def fault(what: str, prompt_id: str) -> None:
        if what == "scoring":
            raise UnusableScoreError

    result = asyncio.run(collect(Services(fault=fault).bound(), request(1)))
    assert result.num_unscored == 1
    assert kinds(list(result.spans))["scoring"] == 1


def test_nothing_is_scored_where_no_teacher_is_asked() -> None:
    result = asyncio.run(collect(Services().bound(), request(2, with_teacher=False)))
    assert kinds(list(result.spans)) == {"generate": 4, "tool": 2, "reward": 2}
