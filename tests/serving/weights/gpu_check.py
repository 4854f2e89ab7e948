"""Handles of CUDA memory between processes: right, in order, freed, and how fast; a program, no
test.

    .venv/bin/python -m tests.serving.weights.gpu_check [--mb 256] [--repetitions 5]

Other processes read each bucket as SGLang does, which finds the GPU by its UUID: two on GPU 0, and
where there are two GPUs a third one, which copies to the other. Checked are the values, those too
that a slow kernel is still to write, and that no side keeps memory. Said is what a reader leaves
that dies. Then a table: seconds from the trainer's tensors to tensors of the reader's own, by
handle and by value. Ends with 1 if something differs.
"""

from __future__ import annotations

import argparse
import io
import os
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
ANSWER_SECONDS = 120.0
WARM_UP, ROUNDS = 10, 100
"""In which memory that is not given back would add up; the first ones load what stays loaded."""
LARGE = (4096, 1024)
SLOW_CYCLES = 2_000_000_000
"""Of a kernel that keeps the GPU busy for about a second."""
DIE = b"die"
"""Makes a reader open the next payload and end."""


def main() -> int:
    """Print one line for each check, then the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=256, help="size of a bucket, MiB")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU")
    print(f"{torch.cuda.get_device_name(GPU)}, torch {torch.__version__}")
    gpus = ["0", "0", *(["1,0"] if torch.cuda.device_count() > 1 else [])]
    with ExitStack() as stack:
        readers = [Reader(stack, visible) for visible in gpus]
        checks = [check_values(readers), check_order(readers), check_memory(readers)]
        tell_of_a_death(Reader(stack, "0"))
        measure(readers, options.mb << 20, options.repetitions)
    return 0 if all(checks) else 1


class Reader:
    """Another process, which stands for a rank of an engine; it has the first GPU it sees."""

    def __init__(self, stack: ExitStack, visible_gpus: str) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        arguments = (there, visible_gpus)
        self.process = context.Process(target=read_payloads, args=arguments, daemon=True)
        self.process.start()
        there.close()
        stack.callback(self._stop)

    def answer(self) -> dict[str, int]:
        """The sum of each tensor's bytes."""
        if not self.connection.poll(ANSWER_SECONDS):
            raise TimeoutError(f"a reader gave no answer within {ANSWER_SECONDS:.0f} s")
        answer: dict[str, int] = self.connection.recv()
        return answer

    def _stop(self) -> None:
        if self.process.is_alive():
            self.connection.send_bytes(b"")
        self.process.join(ANSWER_SECONDS)


def read_payloads(connection: Connection, visible_gpus: str) -> None:
    """The other process: copies each bucket to memory of its own, as an engine does."""
    os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus
    while payload := connection.recv_bytes():
        if payload == DIE:
            opened = read(connection.recv_bytes())
            torch.cuda.synchronize()
            os._exit(1 if opened else 2)
        own = [(name, tensor.to(GPU, copy=True)) for name, tensor in read(payload)]
        torch.cuda.synchronize()
        connection.send({name: sum_of_bytes(tensor) for name, tensor in own})


def read(payload: bytes) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a bucket, by value or in SGLang's format "flattened_bucket"."""
    found = SglangUnpickler(io.BytesIO(payload)).load()
    if isinstance(found, list):
        return found
    packed = found["flattened_tensor"]
    return [
        (place.name, packed[place.start_idx : place.end_idx].view(place.dtype).view(place.shape))
        for place in found["metadata"]
    ]


def sum_of_bytes(tensor: torch.Tensor) -> int:
    """Equal for equal tensors, and hardly ever else."""
    weights = torch.arange(1, tensor.nbytes + 1, device=tensor.device) % 251
    return int((tensor.contiguous().view(-1).view(torch.uint8) * weights).sum().item())


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
        (f"{dtype} {shape}", torch.randn(shape, device=GPU).to(dtype))
        for dtype in (torch.float32, torch.bfloat16)
        for shape in ((1,), (3, 5), LARGE)
    ]
    expected = {name: sum_of_bytes(tensor) for name, tensor in bucket}
    answers = send(readers, ByCudaHandle(GPU), bucket)
    return report("values", all(sums == expected for sums in answers), f"{len(bucket)} tensors")


def check_order(readers: Sequence[Reader]) -> bool:
    """Whether readers wait for what the trainer's GPU has still to write."""
    expected = sum_of_bytes(torch.full(LARGE, 7.0, device=GPU))
    late = torch.zeros(LARGE, device=GPU)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLOW_CYCLES)
    late.fill_(7.0)
    answers = send(readers, ByCudaHandle(GPU), [("late", late)])
    is_right = all(sums == {"late": expected} for sums in answers)
    return report("order", is_right, "written after the handle was asked for")


def check_memory(readers: Sequence[Reader]) -> bool:
    """Whether all sides give back what a bucket took."""
    bucket = [("weight", torch.zeros(LARGE, device=GPU))]
    before, free = torch.cuda.memory_allocated(), 0
    for number in range(ROUNDS):
        if number == WARM_UP:
            free = torch.cuda.mem_get_info(GPU)[0]
        send(readers, ByCudaHandle(GPU), bucket)
    kept = torch.cuda.memory_allocated() - before
    lost = free - torch.cuda.mem_get_info(GPU)[0]
    detail = f"{kept} bytes kept by torch, {lost} lost on the GPU in {ROUNDS - WARM_UP} buckets"
    return report("memory", kept == 0 and lost < bucket[0][1].nbytes, detail)


def tell_of_a_death(reader: Reader) -> None:
    """Print what stays of a bucket whose reader was killed with the handle open."""
    before = torch.cuda.memory_allocated()
    by_handle = ByCudaHandle(GPU)
    (payload,) = by_handle.payloads([("weight", torch.zeros(LARGE, device=GPU))], 1)
    reader.connection.send_bytes(DIE)
    reader.connection.send_bytes(payload)
    reader.process.join(ANSWER_SECONDS)
    by_handle.release()
    kept = torch.cuda.memory_allocated() - before
    print(f"a reader that died ({reader.process.exitcode}) leaves {kept} bytes allocated here")


def send(
    readers: Sequence[Reader], encoding: TensorEncoding, bucket: Bucket
) -> list[dict[str, int]]:
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
    print(f"\n{count * numel * 2 / 1e6:.0f} MB in bfloat16, {len(readers)} readers\n")
    print("| way | seconds | of by value |\n|---|---|---|")
    for way, median in medians.items():
        print(f"| {way} | {median:.4f} | {median / medians['by value']:.3f} |")


def report(what: str, is_right: bool, detail: str) -> bool:
    """Print one line; returns ``is_right``."""
    print(f"{'ok' if is_right else 'WRONG'}: {what} ({detail})", flush=True)
    return is_right


if __name__ == "__main__":
    sys.exit(main())
