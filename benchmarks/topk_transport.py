"""What the teacher's K likeliest tokens cost on their way: bytes of the answer, and seconds.

    .venv/bin/python -m benchmarks.topk_transport [--repetitions 3]

A real engine (the arithmetic example's teacher) scores sequences of random tokens with K = 0, 8 and
64, answering once with flat base64 arrays, as ``serving/client/scoring.py`` asks for, and once with
nested lists. Reading is the CPU time from the answer's bytes to numpy arrays; asking is the time on
the wall until all answers are there. Both are given a token, and as a ratio to K = 0.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
from numpy.typing import NDArray

from benchmarks.served_example import run_while_served
from sod_mcore.serving.client.scoring import read_answer
from sod_mcore.serving.endpoints import ModelEndpoints, read_endpoints

SEQUENCES, LENGTH = 48, 400
CANDIDATES = (0, 8, 64)
TIMEOUT_SECONDS = 300.0
ARRAYS = {"return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}


@dataclass(frozen=True)
class Cost:
    """Of one scored token."""

    num_bytes: float
    asking_seconds: float
    reading_seconds: float


def main() -> None:
    """Print one Markdown row for each K and form."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--served", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.served is not None:
        asyncio.run(measure(options.served, options.repetitions))
        return
    run_while_served("benchmarks.topk_transport", sys.argv[1:], train_prompts=32)


async def measure(folder: Path, repetitions: int) -> None:
    """Ask an engine that runs, and print the table."""
    model = read_endpoints(folder).model("teacher")
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (SEQUENCES, LENGTH), np.int32)
    cases = [(k, form) for k in CANDIDATES for form in ("arrays", "lists") if k or form == "lists"]
    costs: dict[tuple[int, str], list[Cost]] = {case: [] for case in cases}
    for _ in range(repetitions + 1):
        for k, form in cases:
            costs[k, form].append(await cost(model, ids, k, form))
    print("\n| K | form | bytes a token | asking, of K = 0 | reading, µs a token | of K = 0 |")
    print("|---|---|---|---|---|---|")
    base = median(costs[0, "lists"])
    for (k, form), measured in costs.items():
        own = median(measured)
        print(
            f"| {k} | {form if k else '–'} | {own.num_bytes:.0f} | "
            f"{own.asking_seconds / base.asking_seconds:.2f} | "
            f"{own.reading_seconds * 1e6:.1f} | {own.reading_seconds / base.reading_seconds:.1f} |",
            flush=True,
        )


async def cost(model: ModelEndpoints, ids: NDArray[np.int32], k: int, form: str) -> Cost:
    """Score all sequences at once."""
    url = model.engines[0]
    started = time.monotonic()
    async with aiohttp.ClientSession() as session:
        answers = await asyncio.gather(*(ask(session, url, row.tolist(), k, form) for row in ids))
    asked = time.monotonic() - started
    started = time.process_time()
    for row, answer in zip(ids, answers, strict=True):
        read_answer(orjson.loads(answer)["meta_info"], row, model.vocab_size, top_k=k)
    read = time.process_time() - started
    tokens = ids.size
    return Cost(sum(map(len, answers)) / tokens, asked / tokens, read / tokens)


async def ask(
    session: aiohttp.ClientSession, url: str, ids: Sequence[int], k: int, form: str
) -> bytes:
    """The bytes of one answer."""
    request: dict[str, Any] = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        **({"top_logprobs_num": k} if k else {}),
        **(ARRAYS if k and form == "arrays" else {}),
    }
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    async with session.post(f"{url}/generate", json=request, timeout=timeout) as response:
        response.raise_for_status()
        return await response.read()


def median(costs: Sequence[Cost]) -> Cost:
    """Of each number, without the first repetition."""
    rest = costs[1:]
    return Cost(
        statistics.median(c.num_bytes for c in rest),
        statistics.median(c.asking_seconds for c in rest),
        statistics.median(c.reading_seconds for c in rest),
    )


if __name__ == "__main__":
    main()
