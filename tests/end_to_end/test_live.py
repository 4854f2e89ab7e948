"""The whole loop with every real component: what must hold about its results."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.arithmetic.demonstrations import TOOL
from sod_mcore.chat import ChatRenderer
from sod_mcore.trajectory import RecordedBatch, Trajectory, recorded_batch_path
from tests.end_to_end.conftest import STEPS, LiveRun
from tests.end_to_end.programs import TEACHER, metrics


def recorded(live_run: LiveRun) -> list[RecordedBatch]:
    return [
        RecordedBatch.load(recorded_batch_path(live_run.recordings, step)) for step in range(STEPS)
    ]


def input_logprobs(folder: Path, trajectory: Trajectory) -> np.ndarray:
    """Log-prob of each token by plain transformers; entry 0 is NaN."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(trajectory.token_ids.astype(np.int64))[None]
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    picked = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
    return np.concatenate([[np.nan], picked])


def test_every_step_sampled_scored_and_trained_everything(live_run: LiveRun) -> None:
    lines = metrics(live_run.directory)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    for line in lines[1:]:
        assert line["rollout/trajectories"] == 32
        assert line["rollout/dropped"] == 0
        assert line["rollout/unscored"] == 0
        assert line["update/skipped"] == 0
        assert np.isfinite(line["update/loss"])


def test_the_student_moves_towards_the_teacher(live_run: LiveRun) -> None:
    divergences = [line["distillation/reverse_kl"] for line in metrics(live_run.directory)[1:]]
    assert divergences[-1] < 0.8 * divergences[0], divergences


def test_engine_and_trainer_agree_after_every_sync(live_run: LiveRun) -> None:
    for line in metrics(live_run.directory):
        assert line["weights/probe_difference"] < 1e-4


def test_tokens_come_from_the_weights_of_their_step(live_run: LiveRun) -> None:
    for step, batch in enumerate(recorded(live_run)):
        for trajectory in batch.trajectories:
            assert (trajectory.weight_version[trajectory.loss_mask] == step).all()


def test_recorded_teacher_scores_are_those_of_transformers(live_run: LiveRun) -> None:
    for trajectory in recorded(live_run)[1].trajectories[:4]:
        expected = input_logprobs(TEACHER, trajectory)
        mask = trajectory.loss_mask
        np.testing.assert_allclose(trajectory.teacher_logprobs[mask], expected[mask], atol=1e-4)
        assert trajectory.teacher_topk_logprobs is not None
        likeliest = trajectory.teacher_topk_logprobs[mask].max(axis=1)
        assert (likeliest >= expected[mask] - 1e-4).all()


def test_rollout_logprobs_are_those_of_the_student(live_run: LiveRun) -> None:
    student = Path(live_run.tree["student"]["model_path"])
    for trajectory in recorded(live_run)[0].trajectories[:4]:
        expected = input_logprobs(student, trajectory)
        mask = trajectory.loss_mask
        np.testing.assert_allclose(trajectory.rollout_logprobs[mask], expected[mask], atol=1e-4)


def test_programs_really_ran(live_run: LiveRun) -> None:
    trajectories = [t for batch in recorded(live_run) for t in batch.trajectories]
    assert sum(len(t.tool_succeeded) for t in trajectories) > len(trajectories) / 2
    assert any(t.is_correct for t in trajectories)
    observations = [m["content"] for t in trajectories for m in t.messages if m["role"] == "tool"]
    assert any(text.strip().lstrip("-").isdigit() for text in observations)


def test_what_was_not_sampled_is_exactly_what_the_template_writes(live_run: LiveRun) -> None:
    renderer = ChatRenderer.from_folder(TEACHER)
    for trajectory in recorded(live_run)[0].trajectories:
        question, *dialogue = trajectory.messages
        expected = [renderer.render_prompt([question], [TOOL])]
        turns = iter(range(trajectory.num_turns))
        for message in dialogue:
            if message["role"] == "tool":
                expected.append(renderer.observation_ids(message["content"]))
            else:
                expected.append(trajectory.token_ids[trajectory.turn_index == next(turns)])
        np.testing.assert_array_equal(trajectory.token_ids, np.concatenate(expected))


def test_canonical_trajectories_equal_their_one_shot_rendering(live_run: LiveRun) -> None:
    """Where the student sampled what the tokenizer would have written, nothing tells a rollout from
    a rendered conversation. (A student may sample other tokens for the same text.)"""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    num_compared = 0
    for trajectory in (t for batch in recorded(live_run) for t in batch.trajectories):
        rendered = tokenizer.apply_chat_template(
            list(trajectory.messages), tools=[TOOL], tokenize=False
        )
        text = str(rendered).removesuffix("\n")
        ids = trajectory.token_ids.tolist()
        if trajectory.end_reason == "answer" and tokenizer.decode(ids) == text:
            num_compared += tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert num_compared > 10


def test_the_export_is_what_the_engine_served_last(live_run: LiveRun) -> None:
    exported = AutoModelForCausalLM.from_pretrained(live_run.exported, dtype=torch.float32)
    served = AutoModelForCausalLM.from_pretrained(
        live_run.directory / "weights" / f"version_{STEPS:06d}", dtype=torch.float32
    )
    for (name, ours), theirs in zip(
        exported.state_dict().items(), served.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert AutoTokenizer.from_pretrained(live_run.exported).chat_template


def test_weights_and_biases_files_are_there(live_run: LiveRun) -> None:
    assert list((live_run.directory / "wandb").glob("offline-run-*/*.wandb"))


def test_no_process_of_the_run_is_left(live_run: LiveRun) -> None:
    marker = str(live_run.config).encode()
    own = os.getpid()
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        assert marker not in command or int(process.parent.name) == own, command


def test_trajectories_survive_the_round_trip(live_run: LiveRun, tmp_path: Path) -> None:
    batch = recorded(live_run)[0]
    batch.save(tmp_path / "again.npz")
    again = RecordedBatch.load(tmp_path / "again.npz")
    for first, second in zip(batch.trajectories, again.trajectories, strict=True):
        for field in dataclasses.fields(first):
            np.testing.assert_array_equal(
                getattr(first, field.name), getattr(second, field.name), err_msg=field.name
            )
