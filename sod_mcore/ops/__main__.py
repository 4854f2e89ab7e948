"""Tells where the fused operations can run, and if not, why not and what mends it.

    python -m sod_mcore.ops           what was built, and which devices of this machine can use it
    python -m sod_mcore.ops --check   also compare it with eager torch on each of those devices

Ends with 0 if the fused operations can run on the CPU and on every GPU that torch sees (and equal
the eager ones, where checked), with 2 where SOD_OPS has a value it cannot have, else with 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sod_mcore.ops import Objective, StepWeightedKL, reference, step_weighted_kl
from sod_mcore.ops.extension import (
    extension_for,
    load_extension,
    missing_reason,
    requested_choice,
)

NUM_ROWS, VOCAB_SIZE, PADDED_VOCAB_SIZE, TOP_K = 64, 5000, 5120, 16
# bfloat16 keeps 8 bits of the gradient, the only result that is not float32.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
OBJECTIVE = Objective(
    k2_coefficient=0.1,
    k3_coefficient=0.1,
    topk_divergence="jsd",
    topk_coefficient=1.0,
    entropy_coefficient=0.01,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sod_mcore.ops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="compare with eager torch")
    options = parser.parse_args(arguments)
    try:
        choice = requested_choice()
    except ValueError as error:
        parser.error(str(error))
    describe_build(load_extension(), choice)
    verdicts = [describe_device(device, choice) for device in devices()]
    if options.check:
        verdicts += [check_device(device) for device in devices()]
    return 0 if all(verdicts) else 1


def devices() -> list[torch.device]:
    """The CPU and every GPU that torch sees."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(num_gpus))]


def describe_build(extension: ModuleType | None, choice: str) -> None:
    """What was built, what the environment asks for, and whether torch sees a GPU."""
    if extension is None:
        say("extension", "none")
    else:
        say("extension", str(extension.__file__))
        say("CPU kernels", f"{extension.cpu_target()}, chosen for this processor")
        say("CUDA kernels", describe_cuda(extension))
    say("SOD_OPS", choice)
    if not torch.cuda.is_available():
        say("GPUs", f"none that torch {torch.__version__} sees")


def describe_cuda(extension: ModuleType) -> str:
    """For which GPUs there are kernels, or why there are none."""
    if not extension.with_cuda:
        return f"none: {extension.cuda_missing_reason}"
    numbers = extension.cuda_architectures.split(",")
    built = ", ".join(f"sm_{number}" for number in numbers)
    return f"{built} and PTX for later ones, by CUDA {extension.cuda_version}"


def describe_device(device: torch.device, choice: str) -> bool:
    """Say what runs there; whether the fused operations can."""
    name = str(device)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{device} (sm_{major}{minor}, {torch.cuda.get_device_name(device)})"
    reason = missing_reason(device)
    if choice == "eager":
        verdict = f"eager torch, as SOD_OPS asks; {reason or 'the kernels could run'}"
    elif reason is None:
        verdict = "fused"
    else:
        ending = "an error, as SOD_OPS asks" if choice == "fused" else "eager torch only"
        verdict = f"{ending}: {reason}"
    say(name, verdict)
    return reason is None


def check_device(device: torch.device) -> bool:
    """Whether the fused loss and its gradient equal the eager ones there."""
    if missing_reason(device) is not None or extension_for(device) is None:
        say(f"check {device}", "nothing to compare: eager torch is used")
        return True
    verdicts = [check_dtype(device, dtype) for dtype in TOLERANCE]
    return all(verdicts)


def check_dtype(device: torch.device, dtype: torch.dtype) -> bool:
    """The same for one type of logits."""
    logits, arguments = random_case(device, dtype)
    try:
        fused = gradient_and_values(step_weighted_kl, logits, arguments)
    except RuntimeError as error:  # what a launch that failed becomes
        say(f"check {device} {dtype}", f"FAILED: {error}")
        return False
    eager = gradient_and_values(reference.step_weighted_kl, logits, arguments)
    difference = max(float((fused[name] - eager[name]).abs().max()) for name in eager)
    is_equal = difference <= TOLERANCE[dtype]  # False for NaN
    verdict = f"largest difference {difference:.1e}, at most {TOLERANCE[dtype]:.0e} is allowed"
    say(f"check {device} {dtype}", verdict if is_equal else f"FAILED: {verdict}")
    return is_equal


def random_case(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    """Logits ``[N, padded]`` and the other arguments of the loss, from a seed."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(NUM_ROWS, VOCAB_SIZE, generator=generator).log_softmax(-1)
    logits = torch.randn(NUM_ROWS, PADDED_VOCAB_SIZE, generator=generator).to(dtype)
    targets = torch.randint(VOCAB_SIZE, (NUM_ROWS,), generator=generator)
    student = logits[:, :VOCAB_SIZE].float().log_softmax(-1)
    topk_logprobs, topk_ids = teacher.topk(TOP_K)
    tensors = {
        "targets": targets,
        "token_weights": torch.rand(NUM_ROWS, generator=generator),
        "advantages": torch.randn(NUM_ROWS, generator=generator),
        # Ratios inside and outside the clip bounds, none at one.
        "old_logprobs": student.gather(1, targets[:, None])[:, 0]
        + 0.3 * torch.randn(NUM_ROWS, generator=generator),
        "teacher_logprobs": teacher.gather(1, targets[:, None])[:, 0],
        "teacher_topk_ids": topk_ids,
        "teacher_topk_logprobs": topk_logprobs,
    }
    arguments: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors.items()}
    arguments |= {"vocab_size": VOCAB_SIZE, "group": None, "temperature": 0.9}
    return logits.to(device), arguments | {"objective": OBJECTIVE}


def gradient_and_values(
    operation: Any, logits: Tensor, arguments: dict[str, Any]
) -> dict[str, Tensor]:
    """What the operation returns and the gradient of its loss, float32."""
    leaf = logits.clone().requires_grad_()
    result: StepWeightedKL = operation(leaf, **arguments)
    result.token_loss.sum().backward()
    assert leaf.grad is not None
    return {
        "gradient": leaf.grad.float(),
        "token_loss": result.token_loss.detach(),
        "logprobs": result.logprobs,
        "entropy": result.entropy,
        "ratio": result.ratio,
        **result.terms,
    }


def say(what: str, text: str) -> None:
    """One line of the report."""
    print(f"{what + ':':<14} {text}")


if __name__ == "__main__":
    sys.exit(main())
