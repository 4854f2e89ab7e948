"""Stands in for SGLang's compiled kernel package, which exists only as a CUDA wheel.

SGLang 0.5.23 imports names from it at import time on any device. Without AMX none of the functions
is called for a dense decoder without speculative decoding; one that is called after all says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} exists only where there is a GPU")

    missing.__name__ = name
    return missing
