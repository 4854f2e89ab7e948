"""``pretrain_sod.py`` computes the same loss and gradient on every layout, by configuration alone.

One recorded batch is trained on once for each case, and everything is compared with the eager
computation in ``eager_sod.py`` and with the case on a single rank. The vocabulary needs padding on
every layout, and the eager model has none, so padded rows that changed anything would show.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sod_mcore.config import AlgorithmConfig, TopKConfig
from sod_mcore.trajectory import RecordedBatch
from tests.end_to_end.conftest import LiveRun
from tests.end_to_end.eager_sod import EagerUpdate, Floats, eager_update
from tests.end_to_end.layouts import LayoutCase, Update, run_update

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
FLOAT32_CASES = (
    LayoutCase("tp1", "paper"),
    LayoutCase("tp2_sp", "paper", tensor=2, sequence_parallel=True, micro_batch_tokens=1024),
    LayoutCase("dp2_padded", "paper", data=2, packing="padded", micro_batch_tokens=400),
    LayoutCase("tp2_pp2", "paper", tensor=2, pipeline=2, micro_batch_tokens=700),
    LayoutCase("tp1_clipped", "clipped", packing="padded"),
    LayoutCase("tp1_reverse", "reverse"),
    LayoutCase("tp1_eager_operations", "reverse", ops="eager"),
    LayoutCase("tp2_reverse", "reverse", tensor=2, packing="padded"),
    LayoutCase(
        "tp2_pp2_chunked",
        "clipped",
        tensor=2,
        pipeline=2,
        micro_batch_tokens=700,
        lm_head="chunked",
    ),
    LayoutCase("tp2_recompute", "clipped", tensor=2, recompute=True, micro_batch_tokens=1024),
    LayoutCase("pp2_padded", "clipped", pipeline=2, packing="padded", micro_batch_tokens=400),
    LayoutCase(
        "dp2_distributed",
        "clipped",
        data=2,
        distributed_optimizer=True,
        micro_batch_tokens=400,
        ddp=OVERLAP,
    ),
    LayoutCase(
        "tp2_pp2_sp_recompute",
        "clipped",
        tensor=2,
        pipeline=2,
        sequence_parallel=True,
        recompute=True,
        distributed_optimizer=True,
        packing="padded",
        micro_batch_tokens=1024,
    ),
)
BFLOAT16_CASES = (
    LayoutCase("bf16_tp1", "paper", precision="bf16"),
    LayoutCase(
        "bf16_dp2_distributed",
        "paper",
        data=2,
        distributed_optimizer=True,
        micro_batch_tokens=400,
        precision="bf16",
    ),
    LayoutCase(
        "bf16_tp2_sp_padded",
        "paper",
        tensor=2,
        sequence_parallel=True,
        packing="padded",
        micro_batch_tokens=1024,
        precision="bf16",
    ),
)
ONE_RANK = {"paper": "tp1", "clipped": "tp1_clipped", "reverse": "tp1_reverse"}

LOSS_TOLERANCE = 2e-6
"""Relative, float32."""
GRADIENT_TOLERANCE = 3e-5
"""Of the tensor's largest entry, or of the whole gradient's norm, float32. Batches differ from live
run to live run. Most stay below 1e-5; 1.1e-5 was seen in the q_norm of one, at tensor parallelism
2, and its other tensors below 6e-6. The reverse KL multiplies the rounding of a log-prob by
log-ratios of some nats; 6e-6 was seen there."""

BFLOAT16_TOLERANCE = {"loss_to_eager": 5e-3, "norm_to_eager": 5e-2, "gradient_to_eager": 0.25}
"""Measured on six batches, which differ in every live run: at most 2.1e-3, 2.2e-2 and 0.12."""


@pytest.fixture(scope="module")
def objectives(live_run: LiveRun) -> dict[str, AlgorithmConfig]:
    """``paper``: distillation as an advantage, of the weights that sampled, ratio 1. ``clipped``:
    later weights, ratios to those that sampled, with all three clips at work, and the teacher's
    top-K tokens. ``reverse``: the same with the reverse KL, whose gradient divides by what the
    teacher's top-K leaves, a small difference of large numbers. All losses are far from 0, as
    relative differences need: they hold a divergence.

    The clips are moved between the ratios of two tokens: rounding must not decide which side a
    token is on. Nor must it decide a weight: student and teacher sometimes agree on a whole step to
    1e-5 nats, and the paper's epsilon of 1e-6 leaves such a quotient to the rounding of log-probs
    (noise of 5e-7 nats changed the mean weight of a batch by up to 4e-4).
    """
    common: dict[str, Any] = {
        "prompts_per_step": 8,
        "group_size": 4,
        "prompts_per_mini_batch": 8,
        "weight_epsilon": 0.05,
    }
    paper = AlgorithmConfig(**common)
    clipped = dataclasses.replace(
        paper,
        distillation="topk_loss",
        old_logprobs="rollout",
        topk=TopKConfig(k=16, divergence="forward_kl"),
    )
    ratios = eager_update(student_of(live_run, "clipped"), trajectories(live_run), clipped).ratios
    clipped = dataclasses.replace(
        clipped,
        clip_low=1 - between_tokens(ratios, 1 - clipped.clip_low),
        clip_high=between_tokens(ratios, 1 + clipped.clip_high) - 1,
        dual_clip=between_tokens(ratios, clipped.dual_clip),
    )
    reverse = dataclasses.replace(clipped, topk=TopKConfig(k=16, divergence="reverse_kl"))
    return {"paper": paper, "clipped": clipped, "reverse": reverse}


@pytest.fixture(scope="module")
def expected(
    live_run: LiveRun, objectives: dict[str, AlgorithmConfig]
) -> dict[tuple[str, str], EagerUpdate]:
    """The eager computation of each objective, in float32, by precision of the weights."""
    return {
        (name, precision): eager_update(
            student_of(live_run, name), trajectories(live_run), algorithm, dtype
        )
        for name, algorithm in objectives.items()
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }


@pytest.fixture(scope="module")
def update_of(
    live_run: LiveRun,
    objectives: dict[str, AlgorithmConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[LayoutCase], Update]:
    """Runs a case through ``pretrain_sod.py``; each case once."""
    done: dict[str, Update] = {}

    def update(case: LayoutCase) -> Update:
        if case.name not in done:
            algorithm = dataclasses.asdict(objectives[case.objective])
            folder = tmp_path_factory.mktemp(case.name)
            student = student_of(live_run, case.objective)
            done[case.name] = run_update(case, live_run, student, algorithm, folder)
        return done[case.name]

    return update


def student_of(live_run: LiveRun, objective: str) -> Path:
    """The weights that sampled, or those after the live run's updates."""
    sampled = Path(live_run.tree["student"]["model_path"])
    return sampled if objective == "paper" else live_run.exported


def trajectories(live_run: LiveRun) -> tuple[Any, ...]:
    """Those of the first recorded step."""
    return RecordedBatch.load(live_run.recordings / "step_000000.npz").trajectories


def between_tokens(ratios: Floats, bound: float) -> float:
    """The middle of the widest gap between neighbouring ratios within a tenth of ``bound``."""
    near = np.sort(ratios[np.abs(ratios / bound - 1) < 0.1])
    edges = np.concatenate([[0.9 * bound], near, [1.1 * bound]])
    widest = int(np.diff(edges).argmax())
    return float((edges[widest] + edges[widest + 1]) / 2)


def gradient_difference(ours: Update, theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference over all tensors, as a share of the tensor's largest entry."""
    assert set(ours.gradients) == set(theirs)
    return max(
        float((ours.gradients[name] - theirs[name]).abs().max() / theirs[name].abs().max())
        for name in theirs
    )


def record(
    differences: dict[str, float], case: LayoutCase, record_property: Callable[[str, object], None]
) -> None:
    """Leave what was measured in pytest's report, for ``scripts/layout_table.py``."""
    record_property("layout", str(case))
    for name, value in differences.items():
        record_property(name, f"{value:.1e}")


def relative(value: float, reference: float) -> float:
    return abs(value / reference - 1)


def test_the_vocabulary_needs_padding(live_run: LiveRun) -> None:
    """Megatron pads it to a multiple of 128 times the tensor-parallel size."""
    vocabulary = json.loads((live_run.exported / "config.json").read_text())["vocab_size"]
    assert vocabulary % 128 != 0


def test_the_eager_losses_have_every_part(
    expected: dict[tuple[str, str], EagerUpdate], objectives: dict[str, AlgorithmConfig]
) -> None:
    """What no token meets would be compared in vain."""
    assert expected["paper", "fp32"].mean_step_weight not in (0.0, 1.0)
    ratios, clipped = expected["clipped", "fp32"].ratios, objectives["clipped"]
    assert 0.01 < expected["clipped", "fp32"].clip_fraction < 0.99
    assert (ratios > clipped.dual_clip).any()
    assert all(float(g.abs().max()) > 0 for e in expected.values() for g in e.gradients.values())


@pytest.mark.parametrize("case", FLOAT32_CASES, ids=lambda case: case.name)
def test_float32(
    case: LayoutCase,
    update_of: Callable[[LayoutCase], Update],
    expected: dict[tuple[str, str], EagerUpdate],
    record_property: Callable[[str, object], None],
) -> None:
    update, eager = update_of(case), expected[case.objective, case.precision]
    name_of_one = ONE_RANK[case.objective]
    single = update_of(next(c for c in FLOAT32_CASES if c.name == name_of_one))
    loss = update.metrics["update/loss"]
    differences = {
        "loss_to_eager": relative(loss, eager.loss),
        "loss_to_one_rank": relative(loss, single.metrics["update/loss"]),
        "norm_to_eager": relative(update.metrics["update/grad_norm"], eager.gradient_norm),
        "gradient_to_eager": gradient_difference(update, eager.gradients),
        "gradient_to_one_rank": gradient_difference(update, single.gradients),
    }
    record(differences, case, record_property)
    for name, value in differences.items():
        limit = LOSS_TOLERANCE if name.startswith("loss") else GRADIENT_TOLERANCE
        assert value < limit, differences
    assert update.metrics["update/tokens"] == len(eager.ratios)
    assert update.metrics["update/clip_fraction"] == pytest.approx(eager.clip_fraction)
    mean_step_weight = pytest.approx(eager.mean_step_weight, rel=1e-4)
    assert update.metrics["distillation/mean_w_k"] == mean_step_weight


@pytest.mark.parametrize("case", BFLOAT16_CASES, ids=lambda case: case.name)
def test_bfloat16(
    case: LayoutCase,
    update_of: Callable[[LayoutCase], Update],
    expected: dict[tuple[str, str], EagerUpdate],
    record_property: Callable[[str, object], None],
) -> None:
    """Against the float32 computation on weights that were rounded to bfloat16."""
    update, eager = update_of(case), expected[case.objective, case.precision]
    differences = {
        "loss_to_eager": relative(update.metrics["update/loss"], eager.loss),
        "norm_to_eager": relative(update.metrics["update/grad_norm"], eager.gradient_norm),
        "gradient_to_eager": gradient_difference(update, eager.gradients),
    }
    record(differences, case, record_property)
    for name, limit in BFLOAT16_TOLERANCE.items():
        assert differences[name] < limit, differences
