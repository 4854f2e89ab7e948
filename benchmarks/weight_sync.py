"""How long a weight sync takes, and what it adds to rank 0's memory: every way, beside the folder.

    .venv/bin/python -m benchmarks.weight_sync [--repetitions 3] [--bucket-mb 64] [--engines 1]
        [--device cuda]

Starts real engines with a random model of each size, and changes their weights in turn by each way
with the code that the trainer uses. Seconds are those from the first tensor to confirmed engines,
the writing of the folder included; memory is the growth of this process's peak. The order of the
ways rotates from round to round, so that a busy machine slows all. Shared memory is no setting: it
is measured to show what leaving it out costs.

With --device cuda the models are larger and in bfloat16, engine and trainer share GPU 0, and memory
is that of torch on the GPU. NCCL refuses two ranks on one GPU, so nothing is broadcast there. That
part has not been run yet: it needs a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.shared_memory_transfer import SharedMemoryTransfer
from sod_mcore.serving.endpoints import Endpoints, endpoints_path, read_endpoints
from sod_mcore.serving.weights.disk_transfer import DiskTransfer
from sod_mcore.serving.weights.kept_groups import KeptGroups
from sod_mcore.serving.weights.transfer import WeightTransfer
from sod_mcore.serving.weights.update import update_weights
from sod_mcore.serving.weights.ways import tensor_transfer
from sod_mcore.student.conversion.export import NamedTensors
from sod_mcore.student.conversion.save import save_hf_folder

REPOSITORY = Path(__file__).parents[1]
START_SECONDS = 600.0
STOP_SECONDS = 60.0
UPDATE_SECONDS = 300.0
WAYS = {
    "cpu": ("disk", "tensor", "distributed", "shared memory"),
    "cuda": ("disk", "tensor", "cuda_ipc"),
}
SIZES = {
    "cpu": {
        "0.2M": {"hidden_size": 64, "layers": 2, "vocab_size": 1536},
        "135M": {"hidden_size": 576, "layers": 30, "vocab_size": 49152},
    },
    "cuda": {
        "0.6B": {"hidden_size": 1024, "layers": 28, "vocab_size": 151936},
        "1.7B": {"hidden_size": 2048, "layers": 28, "vocab_size": 151936},
    },
}


@dataclass(frozen=True)
class Measurement:
    """Medians over the repetitions."""

    seconds: float
    peak_bytes: float


def main() -> None:
    """Print one Markdown row for each size and way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    print("| parameters | model, MB | way | seconds | of disk | extra peak memory, MB | of disk |")
    print("|---|---|---|---|---|---|---|")
    for name in SIZES[options.device]:
        with tempfile.TemporaryDirectory() as folder:
            measure_size(name, Path(folder), options)


def measure_size(name: str, folder: Path, options: argparse.Namespace) -> None:
    """Serve a model of one size and print its rows."""
    device = torch.device(options.device)
    model = save_model(SIZES[options.device][name], device, folder / "model")
    size = sum(parameter.nbytes for parameter in model.parameters())
    config = write_config(folder, options.engines, device)
    with (folder / "serving.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "sod_mcore.serving", str(config)],
            cwd=REPOSITORY,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            endpoints = wait_until_served(server, folder)
            bucket_bytes = options.bucket_mb << 20
            with closing(KeptGroups(endpoints, device, UPDATE_SECONDS)) as groups:
                trainer = Trainer(model, endpoints, groups, folder, bucket_bytes)
                results = measure(trainer, options.repetitions)
        finally:
            server.terminate()
            server.wait(timeout=STOP_SECONDS)
    disk = results["disk"]
    for way, result in results.items():
        print(
            f"| {name} | {size / 1e6:.1f} | {way} | {result.seconds:.2f} "
            f"| {result.seconds / disk.seconds:.2f} | {result.peak_bytes / 1e6:.1f} "
            f"| {result.peak_bytes / max(disk.peak_bytes, 1):.2f} |",
            flush=True,
        )


def save_model(size: Mapping[str, int], device: torch.device, folder: Path) -> Qwen3ForCausalLM:
    """A random tied Qwen3: in float32 on a CPU; on a GPU in bfloat16, with the heads of Qwen3."""
    on_cpu = device.type == "cpu"
    heads = size["hidden_size"] // 64 if on_cpu else 16
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=size["vocab_size"],
        hidden_size=size["hidden_size"],
        num_hidden_layers=size["layers"],
        intermediate_size=size["hidden_size"] * 8 // 3 if on_cpu else size["hidden_size"] * 3,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3) if on_cpu else 8,
        head_dim=64 if on_cpu else 128,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).float() if on_cpu else Qwen3ForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    if device.type == "cuda":
        torch.nn.Module.cuda(model)
    return model


def write_config(folder: Path, engines: int, device: torch.device) -> Path:
    """A fleet of ``engines`` engines."""
    model = str(folder / "model")
    engine = {"model_path": model, "max_total_tokens": 1024, "engines": engines}
    serving = {"device": device.type, "student": engine, "start_timeout_seconds": START_SECONDS}
    if device.type == "cuda":
        serving["weight_sync"] = "cuda_ipc"  # lets the engines see the trainer's GPU
        engine |= {"gpus": [0] * engines, "memory_fraction": 0.3 / engines}
    tree = {
        "run": {"directory": str(folder / "run")},
        "student": {"model_path": str(folder / "model")},
        "data": {"train": "unused.parquet"},
        "serving": serving,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def wait_until_served(server: subprocess.Popen[bytes], folder: Path) -> Endpoints:
    """The addresses, once the engine answers."""
    deadline = time.monotonic() + START_SECONDS
    while not endpoints_path(folder / "run").exists():
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no engine:\n{(folder / 'serving.log').read_text()}")
        time.sleep(0.2)
    return read_endpoints(folder / "run")


@dataclass(frozen=True)
class Trainer:
    """What rank 0 of a trainer has, and does for each way."""

    model: Qwen3ForCausalLM
    endpoints: Endpoints
    groups: KeptGroups
    folder: Path
    bucket_bytes: int

    def publish(self, way: str, version: int) -> None:
        """One sync."""
        update_weights(self.endpoints, "student", self._transfer(way), version, UPDATE_SECONDS)

    def _transfer(self, way: str) -> WeightTransfer:
        new = buckets(self.model, self.bucket_bytes)
        if way == "disk":
            save_hf_folder(new, self.folder / "model", self.folder / "weights")
            return DiskTransfer(self.folder / "weights")
        if way == "shared memory":
            return SharedMemoryTransfer(new)
        return tensor_transfer(way, new, self.model.device, self.groups)


def measure(trainer: Trainer, repetitions: int) -> dict[str, Measurement]:
    """All ways in turn; the first round warms up and does not count."""
    device = trainer.model.device
    ways = WAYS[device.type]
    samples: dict[str, list[Measurement]] = {way: [] for way in ways}
    version = 0
    for round_number in range(repetitions + 1):
        first = round_number % len(ways)
        for way in ways[first:] + ways[:first]:
            version += 1
            sample = measure_once(partial(trainer.publish, way, version), device)
            if round_number:
                samples[way].append(sample)
    return {
        way: Measurement(
            statistics.median(sample.seconds for sample in found),
            statistics.median(sample.peak_bytes for sample in found),
        )
        for way, found in samples.items()
    }


def measure_once(update: Callable[[], None], device: torch.device) -> Measurement:
    """One sync."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held, start = torch.cuda.memory_allocated(device), time.monotonic()
        update()
        seconds = time.monotonic() - start
        return Measurement(seconds, torch.cuda.max_memory_allocated(device) - held)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = memory_bytes("VmRSS"), time.monotonic()
    update()
    return Measurement(time.monotonic() - start, memory_bytes("VmHWM") - before)


def memory_bytes(field: str) -> float:
    """A memory field of ``/proc/self/status``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024.0 * int(value.split()[0])
    raise RuntimeError(f"/proc/self/status has no {field}")


def buckets(model: Qwen3ForCausalLM, bucket_bytes: int) -> Iterator[NamedTensors]:
    """Copies, as the trainer gathers them from its shards."""
    bucket: NamedTensors = []
    size = 0
    for name, parameter in model.named_parameters():
        if size and size + parameter.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, parameter.detach().clone()))
        size += parameter.nbytes
    if bucket:
        yield bucket


if __name__ == "__main__":
    main()
