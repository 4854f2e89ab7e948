"""What each rank of the memory test runs: one conversion there and back, with its peak memory.

python memory_program.py FOLDER TENSOR PIPELINE; FOLDER holds ``model`` and gets ``peak_RANK.json``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from sod_mcore.student.conversion.convert import hf_to_megatron, megatron_to_hf
from sod_mcore.student.conversion.megatron_checkpoint import find_checkpoint
from sod_mcore.student.model_config import ParallelSizes
from sod_mcore.student.parallel_state import distributed

BUCKET_BYTES = 8 << 20


def main() -> None:
    """Convert a small model first, so that only the second one's memory counts."""
    folder = Path(sys.argv[1])
    sizes = ParallelSizes(int(sys.argv[2]), int(sys.argv[3]), 1, 1)
    with distributed(sizes, seed=0) as layout:

        def there(name: str) -> None:
            hf_to_megatron(folder / name, folder / f"{name}_megatron", layout)

        def back(name: str) -> None:
            checkpoint = find_checkpoint(folder / f"{name}_megatron")
            out = folder / f"{name}_hf"
            megatron_to_hf(checkpoint, folder / name, out, layout, bucket_bytes=BUCKET_BYTES)

        there("small")
        back("small")
        peaks = {"there": peak_growth(there), "back": peak_growth(back)}
        (folder / f"peak_{layout.rank}.json").write_text(json.dumps(peaks))


def peak_growth(convert: Callable[[str], None]) -> int:
    """By how many bytes this process's own memory grows at most while ``model`` is converted.

    Pages of mapped files are not counted: the kernel takes them back when it needs them.
    """
    before = anonymous_bytes()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        convert("model")
    finally:
        done.set()
        watcher.join()
    return peak - before


def anonymous_bytes() -> int:
    """``RssAnon`` of this process."""
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    (line,) = [text for text in status.splitlines() if text.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
