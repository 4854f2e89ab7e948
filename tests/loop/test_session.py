"""What a session does when an engine comes back without its weights, in the middle of a step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist
from pydantic import TypeAdapter

from sod_mcore.config import SodConfig
from sod_mcore.loop import session as session_module
from sod_mcore.loop.session import Rollouts, Session
from sod_mcore.loop.stop import StopRequested
from sod_mcore.rollout.pool import RolloutInterruptedError
from sod_mcore.trajectory import Prompt, RecordedBatch

pytestmark = pytest.mark.usefixtures("world_of_one")

STEP = 3


class Story:
    """Plays the parts that a session talks to, and writes down what they were asked.

    Attributes:
        interruptions: how often a wait ends without a result.
        stop_after: interruptions after which the run is asked to stop.
        told: what happened, in order.
    """

    def __init__(self, interruptions: int, stop_after: int = 100) -> None:
        self.interruptions = interruptions
        self.stop_after = stop_after
        self.told: list[str] = []

    @property
    def reason(self) -> str | None:
        return "SIGTERM" if self.told.count("interrupted") >= self.stop_after else None

    def batch(self, step: int, weight_version: int) -> RecordedBatch:
        self._wait()
        self.told.append(f"batch {step}")
        return RecordedBatch((), step, weight_version, 0)

    def evaluate(self, *arguments: Any, weight_version: int, **options: Any) -> Any:
        self._wait()
        self.told.append(f"evaluated at {arguments[2]:g}, version {weight_version}")
        return SimpleNamespace(metrics=dict)

    def publish(self, version: int) -> float:
        self.told.append(f"published {version}")
        return 0.0

    def let_engines_sleep(self) -> None:
        self.told.append("asleep")

    def is_weightless(self) -> bool:
        return False

    def _wait(self) -> None:
        if self.told.count("interrupted") < self.interruptions:
            self.told.append("interrupted")
            raise RolloutInterruptedError


def session_of(story: Story, folder: Path, placement: str | None = None) -> Session:
    serving = {"student": {"model_path": "student"}, "placement": placement}
    tree = {
        **({"serving": serving} if placement else {}),
        "run": {"directory": str(folder), "steps": 10},
        "student": {"model_path": "student"},
        "data": {"train": "train.parquet"},
        "evaluation": {"data": "eval.parquet", "temperatures": [0.0, 1.0]},
    }
    layout = SimpleNamespace(world_group=dist.group.WORLD, data_parallel_size=1)
    everything = cast(Any, story)
    prompts = (Prompt((), "", "s", "eval.parquet/0"),)
    return Session(
        TypeAdapter(SodConfig).validate_python(tree),
        cast(Any, SimpleNamespace(layout=layout)),
        first_step=0,
        source=everything,
        rollouts=Rollouts(everything, everything, prompts),
        weights=everything,
        reporter=None,
        stop=everything,
        ending=cast(Any, None),
    )


def test_weights_are_sent_until_the_batch_is_there(tmp_path: Path) -> None:
    story = Story(interruptions=2)
    batch = session_of(story, tmp_path).collect_trajectories(STEP)
    assert batch.step == STEP
    again = ["interrupted", f"published {STEP}"]
    assert story.told == [*again, *again, f"batch {STEP}"]


@pytest.mark.parametrize("placement", ["split", "colocated"])
def test_engines_sleep_once_the_whole_batch_is_there(tmp_path: Path, placement: str) -> None:
    """And not while it is still played, with an engine that waits for its weights."""
    story = Story(interruptions=1)
    session_of(story, tmp_path, placement).collect_trajectories(STEP)
    asleep = ["asleep"] if placement == "colocated" else []
    assert story.told == ["interrupted", f"published {STEP}", f"batch {STEP}", *asleep]


def test_a_stop_is_told_from_an_engine_without_weights(tmp_path: Path) -> None:
    story = Story(interruptions=5, stop_after=2)
    with pytest.raises(StopRequested):
        session_of(story, tmp_path).collect_trajectories(STEP)
    assert story.told == ["interrupted", f"published {STEP}", "interrupted"]


def test_an_evaluation_goes_on_at_its_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(interruptions=1)
    monkeypatch.setattr(session_module, "evaluate_temperature", story.evaluate)
    session_of(story, tmp_path).evaluate(STEP)
    assert story.told == [
        *("interrupted", f"published {STEP}"),
        *(f"evaluated at 0, version {STEP}", f"evaluated at 1, version {STEP}"),
    ]


def test_a_stop_ends_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(interruptions=5, stop_after=1)
    monkeypatch.setattr(session_module, "evaluate_temperature", story.evaluate)
    session_of(story, tmp_path).evaluate(STEP)
    assert story.told == ["interrupted"]
