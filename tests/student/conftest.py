"""One launch of torchrun for each number of ranks, shared by all tests of the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.student.harness import Case, launch, write_models

GRADIENTS = ("logprobs", "sft_gradient", "objective_gradient")
CHUNKED = {"lm_head": "chunked", "lm_head_chunk_rows": 7}
Results = dict[str, dict[str, Any]]

ONE_RANK = (
    Case("packed", "tied", (*GRADIENTS, "round_trip")),
    Case("padded", "tied", GRADIENTS, packing="padded"),
    Case("one_by_one", "tied", GRADIENTS, split=(1, 2, 2, 4, 6)),
    Case("all_in_one", "untied", GRADIENTS, split=(6,)),
    Case("qwen2", "qwen2", (*GRADIENTS, "round_trip")),
    Case("chunked", "tied", GRADIENTS, student=CHUNKED),
    Case("chunked_untied", "untied", GRADIENTS, split=(6,), student=CHUNKED),
    Case("train", "tied", ("train", "empty")),
    Case("train_untied", "untied", ("train",)),
    Case("resume_tied", "tied", ("resume",)),
    Case("bf16_average", "tied", ("average", "refuse_average"), precision="bf16"),
)
TWO_RANKS = (
    Case("tp2", "tied", (*GRADIENTS, "round_trip"), tensor=2),
    Case("tp2_untied", "untied", (*GRADIENTS, "round_trip"), tensor=2),
    Case("tp2_padded", "tied", GRADIENTS, tensor=2, packing="padded"),
    Case("tp2_qwen2", "qwen2", (*GRADIENTS, "round_trip"), tensor=2),
    Case("tp2_sp", "tied", GRADIENTS, tensor=2, sequence_parallel=True),
    Case(
        "tp2_sp_untied_padded",
        "untied",
        GRADIENTS,
        tensor=2,
        sequence_parallel=True,
        packing="padded",
        split=(1, 1, 6),
    ),
    Case("pp2", "tied", (*GRADIENTS, "round_trip", "empty"), pipeline=2),
    Case("pp2_untied_padded", "untied", GRADIENTS, pipeline=2, packing="padded", split=(1, 6)),
    Case("dp2", "tied", (*GRADIENTS, "exchange"), split=(1, 3)),
    Case(
        "dp2_overlap",
        "untied",
        GRADIENTS,
        split=(1, 1, 3),
        ddp={"overlap_grad_reduce": True, "bucket_size": 20_000},
    ),
    Case(
        "tp2_recompute",
        "tied",
        GRADIENTS,
        tensor=2,
        megatron={
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    Case("resume_tied", "tied", ("resume",), tensor=2),
    Case("resharded", "tied", ("load_checkpoint",), pipeline=2),
    Case("tp2_average", "tied", ("average",), tensor=2),
    Case("pp2_load", "tied", ("load_average",), pipeline=2),
    Case(
        "dp2_untied_mean",
        "untied",
        ("average",),
        distributed_optimizer=True,
        split=(3,),
        ddp={"overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    Case(
        "dp2_distributed",
        "tied",
        ("train",),
        distributed_optimizer=True,
        split=(3,),
        ddp={"overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    Case(
        "dp2_distributed_chunked",
        "untied",
        ("train",),
        distributed_optimizer=True,
        split=(3,),
        # So small that the output layer's weight has a bucket of its own to wait for.
        ddp={"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 2000},
        student=CHUNKED,
    ),
    Case("tp2_bf16", "tied", ("logprobs", "train"), tensor=2, precision="bf16"),
    Case("tp2_chunked", "tied", GRADIENTS, tensor=2, student=CHUNKED),
    Case(
        "tp2_sp_chunked_untied",
        "untied",
        GRADIENTS,
        tensor=2,
        sequence_parallel=True,
        split=(1, 1, 6),
        student=CHUNKED,
    ),
    Case("pp2_chunked", "tied", (*GRADIENTS, "empty"), pipeline=2, student=CHUNKED),
    Case(
        "dp2_overlap_chunked",
        "tied",
        GRADIENTS,
        split=(1, 1, 3),
        ddp={"overlap_grad_reduce": True, "bucket_size": 20_000},
        student=CHUNKED,
    ),
    Case(
        "tp2_bf16_chunked",
        "tied",
        ("logprobs", "train"),
        tensor=2,
        precision="bf16",
        student={**CHUNKED, "lm_head_dtype": "fp32"},
    ),
)
FOUR_RANKS = (
    Case("tp2_pp2", "tied", (*GRADIENTS, "round_trip"), tensor=2, pipeline=2),
    Case("tp2_pp2_sp", "tied", GRADIENTS, tensor=2, pipeline=2, sequence_parallel=True),
    Case(
        "tp2_pp2_sp_untied",
        "untied",
        GRADIENTS,
        tensor=2,
        pipeline=2,
        sequence_parallel=True,
        split=(1, 3, 6),
    ),
    Case(
        "tp2_pp2_sp_chunked",
        "tied",
        GRADIENTS,
        tensor=2,
        pipeline=2,
        sequence_parallel=True,
        split=(1, 3, 6),
        student=CHUNKED,
    ),
    Case("tp2_dp2", "tied", GRADIENTS, tensor=2, split=(2, 3)),
    Case(
        "resume_tied",
        "tied",
        ("resume",),
        tensor=2,
        distributed_optimizer=True,
        split=(3,),
    ),
    Case(
        "resharded",
        "tied",
        ("load_checkpoint",),
        tensor=1,
        pipeline=2,
        distributed_optimizer=True,
        split=(3,),
    ),
)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``models/<name>``."""
    folder = tmp_path_factory.mktemp("student")
    write_models(folder / "models")
    return folder


def _launch(cases: tuple[Case, ...], num_ranks: int, student_folder: Path) -> Results:
    folder = student_folder / f"ranks_{num_ranks}"
    folder.mkdir()
    return launch(cases, num_ranks, folder)


@pytest.fixture(scope="session")
def one_rank(student_folder: Path) -> Results:
    """Results of :data:`ONE_RANK`."""
    return _launch(ONE_RANK, 1, student_folder)


@pytest.fixture(scope="session")
def two_ranks(student_folder: Path) -> Results:
    """Results of :data:`TWO_RANKS`."""
    return _launch(TWO_RANKS, 2, student_folder)


@pytest.fixture(scope="session")
def four_ranks(student_folder: Path) -> Results:
    """Results of :data:`FOUR_RANKS`."""
    return _launch(FOUR_RANKS, 4, student_folder)
