"""Inputs of the loss that single-process and multi-process tests share, made from a seed."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sod_mcore.ops import Objective


@dataclass(frozen=True)
class Case:
    """A batch of rows over a padded vocabulary."""

    name: str
    vocab_size: int
    padded_vocab_size: int
    num_rows: int
    objective: Objective
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    top_k: int = 5
    seed: int = 0
    scale: float = 2.0  # standard deviation of the logits


EVERYTHING = Objective(
    k2_coefficient=0.3,
    k3_coefficient=0.2,
    topk_divergence="reverse_kl",
    topk_coefficient=0.7,
    entropy_coefficient=0.05,
)
# k3 is clamped where student and teacher are more than 20 nats apart; the plain formula is not.
WITHOUT_K3 = dataclasses.replace(EVERYTHING, k3_coefficient=0.0)
FORWARD_KL = Objective(topk_divergence="forward_kl", topk_coefficient=1.0)
JSD = Objective(policy_coefficient=0.0, topk_divergence="jsd", topk_coefficient=1.0, jsd_beta=0.3)

CASES = [
    Case("policy-only", 37, 48, 6, Objective()),
    Case("everything", 37, 48, 6, EVERYTHING, temperature=0.7),
    Case("forward-kl", 48, 48, 6, FORWARD_KL),
    Case("jsd", 40, 48, 6, JSD, temperature=1.3),
    Case("bfloat16", 37, 48, 6, EVERYTHING, dtype=torch.bfloat16),
    Case("a-shard-of-padding-alone", 21, 48, 6, EVERYTHING),
    Case("qwen3", 151_936, 152_064, 3, EVERYTHING, top_k=64),
    Case("wide-top-k", 1000, 1024, 6, EVERYTHING, top_k=128, temperature=0.9),
    Case("no-rows", 37, 48, 0, EVERYTHING),
    Case("wide-logits", 37, 48, 6, WITHOUT_K3, scale=25.0),
]


def make_inputs(case: Case) -> tuple[Tensor, dict[str, Any]]:
    """``logits [N, padded]`` with garbage as padding, and the arguments of the loss by name."""
    generator = torch.Generator().manual_seed(case.seed)
    n, vocab, k = case.num_rows, case.vocab_size, case.top_k

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    logits = torch.full((n, case.padded_vocab_size), 1e4)
    logits[:, :vocab] = case.scale * normal(n, vocab)
    logits = logits.to(case.dtype)
    current = (logits[:, :vocab].float() / case.temperature).log_softmax(-1)
    teacher = (case.scale * normal(n, vocab)).log_softmax(-1)
    targets = torch.randint(0, vocab, (n,), generator=generator)
    topk_logprobs, topk_ids = teacher.topk(k, dim=-1)
    if n:
        # One row without a top-K, one entry absent, one impossible, and a target inside the top-K.
        topk_ids[0] = -1
        topk_logprobs[0] = torch.nan
        topk_ids[1, 2] = -1
        topk_logprobs[1, 2] = torch.nan
        topk_logprobs[2, -1] = -torch.inf
        targets[-1] = topk_ids[-1, 0]
    sampled = targets[:, None]
    token_weights = 1.2 * torch.rand(n, generator=generator)
    if n:
        token_weights[-1] = 0.0
    arguments = {
        "targets": targets,
        "token_weights": token_weights,
        "advantages": 2.0 * normal(n),
        "old_logprobs": current.gather(1, sampled)[:, 0] + 0.3 * normal(n),
        "teacher_logprobs": teacher.gather(1, sampled)[:, 0].clamp(min=-8),
        "teacher_topk_ids": topk_ids,
        "teacher_topk_logprobs": topk_logprobs,
    }
    return logits, arguments


def make_layer(case: Case) -> tuple[Tensor, Tensor]:
    """Hidden states ``[N, 16]`` and an output layer ``[padded, 16]`` with garbage as padding."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    hidden = torch.randn(case.num_rows, 16, generator=generator)
    weight = torch.randn(case.padded_vocab_size, 16, generator=generator)
    weight *= case.scale / 4
    weight[case.vocab_size :] = 1e4
    return hidden.to(case.dtype), weight.to(case.dtype)
