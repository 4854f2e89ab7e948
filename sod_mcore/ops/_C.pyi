"""Types of the compiled module; the source is csrc/bindings.cpp, the meaning in csrc/kernels.h.

Addresses are ``Tensor.data_ptr()``, 0 where an array is left out.
"""

with_cuda: bool
cuda_architectures: str  # "80,90,100"; "" without CUDA
cuda_version: str  # of the nvcc that compiled the kernels
cuda_missing_reason: str

def cpu_target() -> str: ...

class Shard:
    def __init__(
        self,
        *,
        logits: int,
        is_bfloat16: bool,
        num_rows: int,
        width: int,
        row_stride: int,
        num_valid_columns: int,
        first_column: int,
        inverse_temperature: float,
    ) -> None: ...

class TokenIds:
    def __init__(
        self,
        *,
        targets: int,
        targets_are_64_bit: bool,
        topk_ids: int,
        topk_ids_are_64_bit: bool,
        num_topk: int,
        teacher_topk_logprobs: int,
    ) -> None: ...

class Objective:
    def __init__(
        self,
        *,
        policy_coefficient: float,
        clip_low: float,
        clip_high: float,
        dual_clip: float | None,
        k2_coefficient: float,
        k3_coefficient: float,
        topk_divergence: str,
        topk_coefficient: float,
        jsd_beta: float,
        entropy_coefficient: float,
    ) -> None: ...

class _Place:
    def row_statistics(
        self, shard: Shard, ids: TokenIds, *, rank: int, world_size: int, statistics: int
    ) -> None: ...
    def token_loss(
        self,
        ids: TokenIds,
        objective: Objective,
        *,
        num_rows: int,
        world_size: int,
        inverse_temperature: float,
        statistics: int,
        token_weights: int,
        advantages: int,
        old_logprobs: int,
        teacher_logprobs: int,
        token_loss: int,
        logprobs: int,
        entropy: int,
        ratio: int,
        is_clipped: int,
        terms: int,
        topk_logprobs: int,
        row_coefficients: int,
        sparse_gradient: int,
    ) -> None: ...
    def logprob_gradient(
        self,
        ids: TokenIds,
        *,
        num_rows: int,
        world_size: int,
        inverse_temperature: float,
        statistics: int,
        logprob_gradient: int,
        entropy_gradient: int,
        row_coefficients: int,
        sparse_gradient: int,
    ) -> None: ...
    def logits_gradient(
        self,
        shard: Shard,
        ids: TokenIds,
        *,
        row_coefficients: int,
        sparse_gradient: int,
        upstream: int,
        upstream_stride: int,
        gradient: int,
        gradient_row_stride: int,
    ) -> None: ...

class Cpu(_Place):
    def __init__(self, *, num_threads: int) -> None: ...

class Cuda(_Place):  # only where with_cuda is True
    def __init__(self, *, stream: int) -> None: ...
