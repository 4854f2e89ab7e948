"""Calls of the kernels on awkward memory, made from a seed, and what each place makes of them.

``run`` takes the kernels of one place through a whole step as the ranks of a tensor-parallel group
would, and refuses a kernel that writes where it may not.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sod_mcore.ops import Objective

GUARD = 24  # elements around the rows of logits and gradient; more than a vector


@dataclass(frozen=True)
class Case:
    """Rows of logits over a vocabulary that is split over ranks."""

    name: str
    vocab_size: int
    width: int  # of each rank's shard, padding included
    dtype: torch.dtype = torch.float32
    num_rows: int = 5
    world_size: int = 1
    top_k: int = 5
    objective: Objective = field(default_factory=Objective)
    temperature: float = 1.0
    logits: str = "normal"  # or equal, masked, outlier, far, nan
    first_element: int = 0  # how far the rows lie past an address of 16 bytes
    row_gap: int = 0  # elements between rows
    in_place: bool = True
    gradient_shift: int = 0  # the same for a gradient that is not in place
    upstream: str = "rows"  # or one, none
    id_dtype: torch.dtype = torch.int64
    seed: int = 0


ALL_TERMS = Objective(
    k2_coefficient=0.3,
    k3_coefficient=0.2,
    topk_divergence="reverse_kl",
    topk_coefficient=0.7,
    entropy_coefficient=0.05,
)
FORWARD_KL = Objective(topk_divergence="forward_kl", topk_coefficient=1.0)
JSD = Objective(
    policy_coefficient=0.0,
    topk_divergence="jsd",
    topk_coefficient=1.0,
    jsd_beta=0.3,
    k3_coefficient=0.5,
)
ENTROPY = Objective(entropy_coefficient=-0.1)
BFLOAT16 = torch.bfloat16

CASES = [
    Case("policy", 300, 300, top_k=0),
    Case("policy-bfloat16", 301, 307, BFLOAT16, top_k=0, upstream="none"),
    Case("everything", 530, 544, objective=ALL_TERMS, temperature=0.7),
    Case("everything-bfloat16", 1531, 1536, BFLOAT16, objective=ALL_TERMS, temperature=0.7),
    Case("unaligned", 333, 340, objective=ALL_TERMS, first_element=3, row_gap=1),
    Case("unaligned-bfloat16", 1333, 1341, BFLOAT16, objective=ALL_TERMS, first_element=5),
    Case("other-alignment", 200, 203, objective=JSD, in_place=False, gradient_shift=1),
    Case("out-of-place", 203, 203, BFLOAT16, objective=JSD, in_place=False, first_element=1),
    Case("wide", 2200, 2208, objective=FORWARD_KL, top_k=7, upstream="one"),
    Case("wide-bfloat16", 4100, 4104, BFLOAT16, objective=FORWARD_KL, top_k=128),
    Case("two-ranks", 700, 368, objective=ALL_TERMS, world_size=2, top_k=64, temperature=0.7),
    Case("rank-of-padding", 90, 96, BFLOAT16, objective=ALL_TERMS, world_size=2, top_k=7),
    Case("fewer-columns-than-a-vector", 3, 3, objective=FORWARD_KL, top_k=1, first_element=2),
    Case("all-but-one-in-top-k", 65, 65, objective=JSD, top_k=64),
    Case("whole-shard-in-top-k", 72, 36, BFLOAT16, objective=ALL_TERMS, world_size=2, top_k=64),
    Case("equal", 4096, 4096, objective=ALL_TERMS, logits="equal", top_k=1),
    Case("masked", 400, 400, objective=FORWARD_KL, logits="masked", top_k=7),
    Case("masked-bfloat16", 400, 400, BFLOAT16, objective=ENTROPY, logits="masked", world_size=2),
    Case("outlier", 400, 400, objective=ALL_TERMS, logits="outlier"),
    Case("far-from-zero", 400, 400, objective=ENTROPY, logits="far", temperature=0.5),
    Case("nan", 400, 400, objective=ALL_TERMS, logits="nan"),
    Case("nan-bfloat16", 403, 403, BFLOAT16, objective=ENTROPY, logits="nan", top_k=0),
    Case("int32", 150, 160, objective=ALL_TERMS, id_dtype=torch.int32, num_rows=9),
]
# With different alignments, both types, short and long rows: what a sanitizer should see.
FEW_CASES = ["everything", "unaligned-bfloat16", "other-alignment", "wide-bfloat16", "two-ranks"]


def random_cases(count: int) -> list[Case]:
    """Combinations that nobody thought of."""
    draw = random.Random(0)
    cases = []
    for seed in range(count):
        world_size = draw.choice([1, 1, 2, 3])
        width = draw.randint(8, 3000 // world_size)
        vocab_size = width * world_size - draw.randint(0, width // 2)
        top_k = min(draw.choice([0, 1, 7, 64, 128]), vocab_size)
        objectives = [Objective(), ENTROPY] + [ALL_TERMS, FORWARD_KL, JSD] * (top_k > 0)
        case = Case(
            f"random-{seed}",
            vocab_size,
            width,
            draw.choice([torch.float32, BFLOAT16]),
            world_size=world_size,
            num_rows=draw.randint(1, 5),
            top_k=top_k,
            objective=draw.choice(objectives),
            temperature=draw.choice([0.7, 1.0, 1.5]),
            first_element=draw.randint(0, 8),
            row_gap=draw.choice([0, 0, 3]),
            in_place=draw.choice([True, False]),
            gradient_shift=draw.choice([0, 0, 5]),
            upstream=draw.choice(["rows", "one", "none"]),
            id_dtype=draw.choice([torch.int32, torch.int64]),
            seed=seed,
        )
        cases.append(case)
    return cases


@dataclass
class Inputs:
    """The tensors of a case; the logits are those of the whole vocabulary, float32."""

    logits: Tensor  # [N, vocab_size], values that the case's dtype holds
    targets: Tensor
    topk_ids: Tensor | None
    values: dict[str, Tensor | None]  # teacher_topk_logprobs, token_weights, ...
    upstream: Tensor | None


def make_inputs(case: Case) -> Inputs:
    """Every row has a peculiarity of its own, where there are rows and top-K ids enough."""
    generator = torch.Generator().manual_seed(case.seed)
    n, vocab, k = case.num_rows, case.vocab_size, case.top_k

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    logits = _make_logits(case, normal(n, vocab)).to(case.dtype).float()
    targets = torch.randint(0, vocab, (n,), generator=generator)
    teacher = (2 * normal(n, vocab)).log_softmax(-1)
    topk_logprobs, topk_ids = teacher.topk(k) if k else (None, None)
    if topk_logprobs is not None and topk_ids is not None:
        targets[0] = topk_ids[0, -1]
        topk_ids[1 % n, 0] = -1
        topk_logprobs[1 % n, 0] = torch.nan
        topk_logprobs[2 % n, -1] = -torch.inf
    if n > 3:
        targets[3] = -1
    finite = logits.nan_to_num(neginf=-1e4)
    current = (finite / case.temperature).log_softmax(-1)
    sampled = current.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return Inputs(
        logits,
        targets.to(case.id_dtype),
        None if topk_ids is None else topk_ids.to(case.id_dtype),
        {
            "teacher_topk_logprobs": topk_logprobs,
            "token_weights": (1.3 * torch.rand(n, generator=generator) - 0.1).clamp(min=0),
            "advantages": 2 * normal(n),
            "old_logprobs": sampled + 0.3 * normal(n),
            "teacher_logprobs": teacher.gather(1, targets.clamp(min=0)[:, None])[:, 0],
        },
        {"rows": normal(n), "one": torch.tensor([0.25]), "none": None}[case.upstream],
    )


def _make_logits(case: Case, noise: Tensor) -> Tensor:
    if case.logits == "equal":
        return torch.full_like(noise, 1.7)
    logits = 3 * noise
    if case.logits == "masked":  # most of each row, and a whole rank's shard of the last
        logits[noise > -0.5] = -torch.inf
        logits[-1, : case.width] = -torch.inf
        logits[:, -1] = 0.5
    if case.logits == "outlier":
        logits[:, case.vocab_size // 3] += 80
    if case.logits == "far":
        logits += 30000
    if case.logits == "nan":
        logits[0, case.vocab_size // 2] = torch.nan
    return logits


class Rows:
    """``[N, width]`` inside memory whose every other element is NaN, and stays as it is."""

    def __init__(self, case: Case, first_element: int) -> None:
        self.stride = case.width + case.row_gap
        self.memory = torch.full(
            (2 * GUARD + case.num_rows * self.stride + 16,), torch.nan, dtype=case.dtype
        )
        size = self.memory.element_size()
        to_aligned = (-self.memory.data_ptr() // size) % (16 // size)
        self.values = self.memory.as_strided(
            (case.num_rows, case.width), (self.stride, 1), GUARD + to_aligned + first_element
        )

    def is_untouched_outside(self) -> bool:
        """Whether every element that is in no row is still NaN."""
        outside = self.memory.clone()
        outside.as_strided(
            self.values.shape, self.values.stride(), self.values.storage_offset()
        ).fill_(torch.nan)
        return bool(outside.isnan().all())


def run(extension: ModuleType, place: Any, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs of every kernel by name; the gradient is that of the whole vocabulary, float32."""
    ranks = [Rows(case, case.first_element) for _ in range(case.world_size)]
    for rank, rows in enumerate(ranks):
        part = inputs.logits[:, rank * case.width : (rank + 1) * case.width]
        rows.values[:, : part.shape[1]] = part.to(case.dtype)
    ids = _ids(extension, inputs)
    shards = [_shard(extension, case, rows, rank) for rank, rows in enumerate(ranks)]

    width = 3 * case.world_size + 1 + case.top_k
    parts = [torch.full((case.num_rows, width), torch.nan) for _ in ranks]
    for rank, (shard, part) in enumerate(zip(shards, parts, strict=True)):
        place.row_statistics(
            shard, ids, rank=rank, world_size=case.world_size, statistics=part.data_ptr()
        )
    statistics = torch.stack(parts).sum(0)
    outputs = {"statistics": statistics, **_token_loss(extension, place, case, inputs, statistics)}

    gradients = []
    for rank, (shard, rows) in enumerate(zip(shards, ranks, strict=True)):
        before = rows.memory.clone()
        gradient = rows if case.in_place else Rows(case, case.first_element + case.gradient_shift)
        stride = 1 if case.upstream == "rows" else 0
        place.logits_gradient(
            shard,
            ids,
            row_coefficients=outputs["row_coefficients"].data_ptr(),
            sparse_gradient=outputs["sparse_gradient"].data_ptr(),
            upstream=_address(inputs.upstream),
            upstream_stride=stride,
            gradient=gradient.values.data_ptr(),
            gradient_row_stride=gradient.stride,
        )
        assert gradient.is_untouched_outside()
        assert case.in_place or same_bits(rows.memory, before)
        valid = min(max(case.vocab_size - rank * case.width, 0), case.width)
        assert bool((gradient.values[:, valid:] == 0).all()), "padding has a gradient"
        gradients.append(gradient.values[:, :valid].float())
    return {**outputs, "gradient": torch.cat(gradients, 1)}


def _token_loss(
    extension: ModuleType, place: Any, case: Case, inputs: Inputs, statistics: Tensor
) -> dict[str, Tensor]:
    n, k = case.num_rows, case.top_k
    shapes = {
        **dict.fromkeys(("token_loss", "logprobs", "entropy", "ratio"), (n,)),
        "terms": (5, n),
        "topk_logprobs": (n, k),
        "row_coefficients": (n, 3),
        "sparse_gradient": (n, 1 + k),
    }
    outputs = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    is_clipped = torch.full((n,), 7, dtype=torch.uint8)
    objective = case.objective
    names = ("token_weights", "advantages", "old_logprobs", "teacher_logprobs")
    place.token_loss(
        _ids(extension, inputs),
        extension.Objective(**vars(objective)),
        num_rows=n,
        world_size=case.world_size,
        inverse_temperature=1 / case.temperature,
        statistics=statistics.data_ptr(),
        is_clipped=is_clipped.data_ptr(),
        **{name: _address(inputs.values[name]) for name in names},
        **{name: tensor.data_ptr() for name, tensor in outputs.items()},
    )
    return {**outputs, "is_clipped": is_clipped}


def run_logprobs(extension: ModuleType, place: Any, case: Case, inputs: Inputs) -> Tensor:
    """Coefficients and sparse gradient for given gradients of log-probs and entropies."""
    ids = _ids(extension, Inputs(inputs.logits, inputs.targets, None, {}, None))
    rows = Rows(case, case.first_element)
    rows.values[:, : case.vocab_size] = inputs.logits.to(case.dtype)
    statistics = torch.empty(case.num_rows, 4)
    shard = _shard(extension, case, rows, 0)
    place.row_statistics(shard, ids, rank=0, world_size=1, statistics=statistics.data_ptr())
    dense, sparse = torch.empty(case.num_rows, 3), torch.empty(case.num_rows, 1)
    place.logprob_gradient(
        ids,
        num_rows=case.num_rows,
        world_size=1,
        inverse_temperature=1 / case.temperature,
        statistics=statistics.data_ptr(),
        logprob_gradient=_address(inputs.values["advantages"]),
        entropy_gradient=_address(inputs.values["token_weights"]),
        row_coefficients=dense.data_ptr(),
        sparse_gradient=sparse.data_ptr(),
    )
    return torch.cat([dense, sparse], 1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN included."""
    first, second = (t.clone(memory_format=torch.contiguous_format) for t in (a, b))
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def _shard(extension: ModuleType, case: Case, rows: Rows, rank: int) -> Any:
    return extension.Shard(
        logits=rows.values.data_ptr(),
        is_bfloat16=case.dtype == BFLOAT16,
        num_rows=case.num_rows,
        width=case.width,
        row_stride=rows.stride,
        num_valid_columns=min(max(case.vocab_size - rank * case.width, 0), case.width),
        first_column=rank * case.width,
        inverse_temperature=1 / case.temperature,
    )


def _ids(extension: ModuleType, inputs: Inputs) -> Any:
    topk_ids = inputs.topk_ids
    return extension.TokenIds(
        targets=inputs.targets.data_ptr(),
        targets_are_64_bit=inputs.targets.dtype == torch.int64,
        topk_ids=_address(topk_ids),
        topk_ids_are_64_bit=topk_ids is not None and topk_ids.dtype == torch.int64,
        num_topk=0 if topk_ids is None else topk_ids.shape[1],
        teacher_topk_logprobs=_address(inputs.values.get("teacher_topk_logprobs")),
    )


def _address(values: Tensor | None) -> int:
    return 0 if values is None else values.data_ptr()
