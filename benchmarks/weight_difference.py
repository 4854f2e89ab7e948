"""How much two consecutive versions of a run's weights differ, and how small the difference packs.

    .venv/bin/python -m benchmarks.weight_difference OLDER NEWER [--dtype bfloat16]

OLDER and NEWER are Hugging Face folders, such as the two in ``weights`` of a run's folder. Prints
one Markdown row, as shares of the weights in the engine's precision: tensors, values and bytes that
differ; bytes of the difference (exclusive or, byte planes apart) and of NEWER itself after zlib.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
ZLIB_LEVEL = 6


def main() -> None:
    """Print the row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("older", type=Path)
    parser.add_argument("newer", type=Path)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    older, newer = load(options.older, dtype), load(options.newer, dtype)
    differing = [name for name in newer if (older[name] != newer[name]).any()]
    old, new = joined(older), joined(newer)
    difference = old ^ new
    shares = [
        (difference.any(axis=1)).mean(),
        np.count_nonzero(difference) / difference.size,
        packed_bytes(difference) / difference.size,
        packed_bytes(new) / new.size,
    ]
    cells = [options.dtype, f"{new.size / 1e6:.1f}", f"{len(differing)} of {len(newer)}"]
    print(f"| {' | '.join(cells + [f'{share:.1%}' for share in shares])} |")


def load(folder: Path, dtype: torch.dtype) -> dict[str, NDArray[np.uint8]]:
    """The bytes of each value ``[values, bytes of one]``, by the tensor's name."""
    arrays = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            numbers = tensor.to(dtype).contiguous().view(INTEGERS[dtype]).numpy()
            arrays[name] = numbers.reshape(-1, 1).view(np.uint8)
    return arrays


def joined(arrays: dict[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """All values in the order of the names."""
    return np.concatenate([arrays[name] for name in sorted(arrays)])


def packed_bytes(values: NDArray[np.uint8]) -> int:
    """Size after zlib, the first bytes of all values before the second ones."""
    return len(zlib.compress(values.T.tobytes(), ZLIB_LEVEL))


if __name__ == "__main__":
    main()
