"""Teachers other than one model that never changes: the student's own average, told the answer; and
one of several, chosen by data source. Real engines, and transformers to say what is right."""

from __future__ import annotations

import copy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from examples.arithmetic.demonstrations import TOOL
from sod_mcore.chat import ChatRenderer
from sod_mcore.config import TeacherConfig
from sod_mcore.data import read_prompts
from sod_mcore.rollout.teacher import teacher_messages
from sod_mcore.trajectory import RecordedBatch, Trajectory, recorded_batch_path
from tests.end_to_end.conftest import LiveRun
from tests.end_to_end.programs import TEACHER, metrics, run, torchrun, write_config

STEPS = 2
DECAY = 0.5
TOLD = TeacherConfig(
    weights="average",
    average_decay=DECAY,
    privileged="ground_truth",
    privileged_text=" The answer is {ground_truth}.",
)


ANSWER_KNOWN = {"privileged": TOLD.privileged, "privileged_text": TOLD.privileged_text}
TEACHERS: dict[str, dict[str, Any]] = {
    "averaged": {"weights": "average", "average_decay": DECAY, **ANSWER_KNOWN},
    "routed": {"by_source": {"reasoning": "strong"}},
    "live": {"weights": "live", **ANSWER_KNOWN},
    "stale": ANSWER_KNOWN,
}
"""The section ``teacher`` of each run. They share the engines, one after the other: the last one
wants the initial weights, but finds the average that the first has left."""


@dataclass(frozen=True)
class TeacherRuns:
    """Folders of the runs, and the student and prompts of all of them."""

    folder: Path
    student: Path
    prompts: Path

    def batch(self, name: str, step: int) -> RecordedBatch:
        return RecordedBatch.load(recorded_batch_path(self.folder / name / "recordings", step))


@pytest.fixture(scope="module")
def runs(live_run: LiveRun, tmp_path_factory: pytest.TempPathFactory) -> TeacherRuns:
    """Two steps of each kind, one after the other on the same three models."""
    folder = tmp_path_factory.mktemp("teachers")
    tree = run_settings(live_run, folder)
    configs = {name: write_run(folder, name, tree) for name in TEACHERS}
    commands = {
        name: shlex.join(
            [
                *torchrun(2, "pretrain_sod.py", str(config)),
                *("--record", str(folder / name / "recordings")),
            ]
        )
        for name, config in configs.items()
    }
    commands["stale"] = f"! {commands['stale']} > {folder / 'stale.log'} 2>&1"
    serve = [sys.executable, "-m", "sod_mcore.serving", str(configs["routed"])]
    run([*serve, "--", "sh", "-c", " && ".join(commands.values())], timeout_seconds=540)
    student, prompts = tree["student"]["model_path"], tree["data"]["train"]
    return TeacherRuns(folder, Path(student), Path(prompts))


def run_settings(live_run: LiveRun, folder: Path) -> dict[str, Any]:
    """What the runs share: the student's own weights as teacher, and a strong one beside it."""
    tree = copy.deepcopy(live_run.tree)
    engine = tree["serving"]["teacher"]
    own = {**engine, "model_path": tree["student"]["model_path"]}
    tree["serving"] |= {"directory": str(folder), "teacher": own, "teachers": {"strong": engine}}
    tree["evaluation"] = {}
    tree["algorithm"] |= {"prompts_per_step": 2, "prompts_per_mini_batch": 1, "topk": {"k": 4}}
    return tree


def write_run(folder: Path, name: str, tree: dict[str, Any]) -> Path:
    """The configuration of a run, without engines that it would not ask."""
    own = {**copy.deepcopy(tree), "teacher": TEACHERS[name]}
    own["run"] = {"directory": str(folder / name), "steps": STEPS, "save_every": 0}
    if name != "routed":
        del own["serving"]["teachers"]
    if name == "live":
        del own["serving"]["teacher"]
    return write_config(folder / f"{name}.yaml", own)


def response_logprobs(folder: Path, prompt: np.ndarray, trajectory: Trajectory) -> np.ndarray:
    """Log-probs of the response behind ``prompt``, by plain transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    response = trajectory.token_ids[trajectory.prompt_length :]
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    picked: np.ndarray = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
    return picked[len(prompt) - 1 :]


def told_prompt(file: Path, trajectory: Trajectory) -> np.ndarray:
    """The teacher's prompt, from the data file."""
    prompts = {prompt.prompt_id: prompt for prompt in read_prompts(file)}
    prompt = prompts[trajectory.group_id]
    messages = teacher_messages(TOLD, prompt)
    assert str(messages[-1]["content"]).endswith(f" The answer is {prompt.ground_truth}.")
    return ChatRenderer.from_folder(TEACHER).render_prompt(messages, [TOOL])


@pytest.mark.parametrize("step", range(STEPS))
def test_the_average_scores_behind_the_prompt_with_the_answer(runs: TeacherRuns, step: int) -> None:
    average = runs.folder / "averaged" / "weights" / f"average_{step:06d}"
    folder = average if step else runs.student
    for trajectory in runs.batch("averaged", step).trajectories[:4]:
        expected = response_logprobs(folder, told_prompt(runs.prompts, trajectory), trajectory)
        scored = trajectory.teacher_logprobs[trajectory.prompt_length :]
        np.testing.assert_allclose(scored, expected, atol=1e-4)


def test_the_average_lies_between_first_and_current_weights(runs: TeacherRuns) -> None:
    """Two updates a step: ``a = (w_0 + w_1) / 4 + w_2 / 2`` for a decay of a half."""
    first = load_weights(runs.student)
    last = load_weights(runs.folder / "averaged" / "weights" / "version_000001")
    average = load_weights(runs.folder / "averaged" / "weights" / "average_000001")
    moved = {name: last[name] - first[name] for name in first}
    behind = {name: last[name] - average[name] for name in first}
    distance, lag = norm(moved), norm(behind)
    assert distance > 0
    assert 0.1 * distance < lag < 0.6 * distance


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors.values()]).sum().sqrt())


def test_the_source_chooses_the_teacher(runs: TeacherRuns) -> None:
    for trajectory in runs.batch("routed", 0).trajectories[:4]:
        prompt = trajectory.token_ids[: trajectory.prompt_length]
        expected = response_logprobs(TEACHER, prompt, trajectory)
        scored = trajectory.teacher_logprobs[trajectory.prompt_length :]
        np.testing.assert_allclose(scored, expected, atol=1e-4)


def test_all_trained(runs: TeacherRuns) -> None:
    for name in ("averaged", "routed", "live"):
        lines = metrics(runs.folder / name)
        assert [line["step"] for line in lines] == list(range(STEPS + 1))
        assert all(line["update/grad_norm"] > 0 for line in lines[1:])
        assert all(line["rollout/unscored"] == 0 for line in lines[1:])
    assert not list((runs.folder / "routed" / "weights").glob("average_*"))


def test_live_weights_score_behind_the_prompt_with_the_answer(runs: TeacherRuns) -> None:
    current = runs.folder / "live" / "weights" / "version_000001"
    for trajectory in runs.batch("live", 1).trajectories[:4]:
        expected = response_logprobs(current, told_prompt(runs.prompts, trajectory), trajectory)
        scored = trajectory.teacher_logprobs[trajectory.prompt_length :]
        np.testing.assert_allclose(scored, expected, atol=1e-4)


def test_an_average_that_another_run_has_left_is_refused(runs: TeacherRuns) -> None:
    log = (runs.folder / "stale.log").read_text()
    assert f"the engines of teacher hold weight version {STEPS}, an average that another run" in log
