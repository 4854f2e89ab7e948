"""Handles of CUDA memory between processes, on one GPU: right, freed, and how fast; no test.

    .venv/bin/python -m tests.serving.weights.gpu_check [--mb 256] [--repetitions 5]

Two other processes read each bucket as SGLang does, which finds the GPU by its UUID. Checked are
the values, to the bit, and that neither side keeps memory. Then a table: seconds from the trainer's
tensors to tensors of the reader's own, by handle and by value. Ends with 1 if something differs.
"""

from __future__ import annotations

import argparse
import io
import pickle
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing
from torch.multiprocessing import reductions

from sod_mcore.serving.weights.cuda_handles import DEVICE_ARGUMENT, ByCudaHandle
from sod_mcore.serving.weights.tensor_check import Bucket
from sod_mcore.serving.weights.tensor_transfer import ByValue, TensorEncoding

GPU = torch.device("cuda", 0)
READERS = 2
ANSWER_SECONDS = 120.0
ROUNDS = 20
"""In which memory that is not given back would add up."""
LARGE = (4096, 1024)


def main() -> int:
    """Print one line for each check, then the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=256, help="size of a bucket, MiB")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU")
    print(f"{torch.cuda.get_device_name(GPU)}, torch {torch.__version__}")
    with ExitStack() as stack:
        readers = [Reader(stack) for _ in range(READERS)]
        is_right = check_values(readers)
        is_right &= check_memory(readers)
        measure(readers, options.mb << 20, options.repetitions)
    return 0 if is_right else 1


class Reader:
    """Another process, which stands for a rank of an engine."""

    def __init__(self, stack: ExitStack) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        process = context.Process(target=read_payloads, args=(there,), daemon=True)
        process.start()
        stack.callback(process.join, ANSWER_SECONDS)
        stack.callback(self.connection.send_bytes, b"")

    def answer(self) -> Any:
        """What it says of the payload that it was sent."""
        if not self.connection.poll(ANSWER_SECONDS):
            raise TimeoutError(f"a reader gave no answer within {ANSWER_SECONDS:.0f} s")
        return self.connection.recv()


def read_payloads(connection: Connection) -> None:
    """The other process: copies each bucket to memory of its own, as an engine does."""
    while payload := connection.recv_bytes():
        named_tensors = SglangUnpickler(io.BytesIO(payload)).load()
        own = [(name, tensor.to(GPU, copy=True)) for name, tensor in named_tensors]
        torch.cuda.synchronize()
        del named_tensors
        sums = [(name, tensor.view(torch.uint8).sum().item()) for name, tensor in own]
        del own
        connection.send((sums, torch.cuda.memory_allocated()))


class SglangUnpickler(pickle.Unpickler):
    """Finds the GPU by its UUID, as SGLang's patch of torch does."""

    def find_class(self, module: str, name: str) -> Any:
        """Called by pickle for each function and class."""
        if name == "rebuild_cuda_tensor":
            return rebuild_on_named_gpu
        return super().find_class(module, name)


def rebuild_on_named_gpu(*arguments: Any) -> torch.Tensor:
    """torch's function, with the GPU's index here in the place of its UUID."""
    uuid = arguments[DEVICE_ARGUMENT]
    (index,) = (
        index
        for index in range(torch.cuda.device_count())
        if str(torch.cuda.get_device_properties(index).uuid) == uuid
    )
    before, after = arguments[:DEVICE_ARGUMENT], arguments[DEVICE_ARGUMENT + 1 :]
    rebuild: Callable[..., torch.Tensor] = reductions.rebuild_cuda_tensor
    return rebuild(*before, index, *after)


def check_values(readers: Sequence[Reader]) -> bool:
    """Whether every reader finds every byte, in tensors of several types and sizes."""
    torch.manual_seed(0)
    bucket = [
        (f"{dtype}", torch.randn(shape, device=GPU).to(dtype))
        for dtype in (torch.float32, torch.bfloat16)
        for shape in ((1,), (3, 5), LARGE)
    ]
    expected = [(name, tensor.view(torch.uint8).sum().item()) for name, tensor in bucket]
    found = [sums for sums, _ in send(readers, ByCudaHandle(GPU), bucket)]
    return report("values", all(sums == expected for sums in found), f"{len(bucket)} tensors")


def check_memory(readers: Sequence[Reader]) -> bool:
    """Whether both sides give back what a bucket took."""
    bucket = [("weight", torch.zeros(LARGE, device=GPU))]
    before = torch.cuda.memory_allocated()
    for _ in range(ROUNDS):
        answers = send(readers, ByCudaHandle(GPU), bucket)
    torch.cuda.ipc_collect()
    kept = torch.cuda.memory_allocated() - before
    theirs = max(allocated for _, allocated in answers)
    is_right = kept == 0 and theirs == 0
    return report("memory", is_right, f"{kept} bytes kept here, {theirs} by a reader")


def send(readers: Sequence[Reader], encoding: TensorEncoding, bucket: Bucket) -> list[Any]:
    """One bucket to all readers; returns their answers."""
    payloads = encoding.payloads(bucket, len(readers))
    for reader, payload in zip(readers, payloads, strict=True):
        reader.connection.send_bytes(payload)
    answers = [reader.answer() for reader in readers]
    encoding.release()
    return answers


def measure(readers: Sequence[Reader], size: int, repetitions: int) -> None:
    """The table; both ways in turn, the first round does not count."""
    numel = LARGE[0] * LARGE[1]
    count = max(1, size // (2 * numel))
    bucket = [(f"{i}", torch.randn(LARGE, device=GPU).bfloat16()) for i in range(count)]
    ways: dict[str, TensorEncoding] = {"by value": ByValue(), "by handle": ByCudaHandle(GPU)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repetitions + 1):
        for way, encoding in ways.items():
            start = time.monotonic()
            send(readers, encoding, bucket)
            seconds[way].append(time.monotonic() - start)
    medians = {way: statistics.median(found[1:]) for way, found in seconds.items()}
    print(f"\n{count * numel * 2 / 1e6:.0f} MB in bfloat16, {READERS} readers\n")
    print("| way | seconds | of by value |\n|---|---|---|")
    for way, median in medians.items():
        print(f"| {way} | {median:.4f} | {median / medians['by value']:.3f} |")


def report(what: str, is_right: bool, detail: str) -> bool:
    """Print one line; returns ``is_right``."""
    print(f"{'ok' if is_right else 'WRONG'}: {what} ({detail})", flush=True)
    return is_right


if __name__ == "__main__":
    sys.exit(main())
