"""Graders that a grading process must survive, or must be killed under."""

import ctypes
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from sod_mcore.rewards import Verdict


def misbehave(response_text: str, ground_truth: str, extra_info: Mapping[str, object]) -> Verdict:
    """Do what the response says."""
    match response_text:
        case "hang":
            Path(ground_truth).write_text(str(os.getpid()))
            while True:
                pass
        case "sleep":
            time.sleep(float(ground_truth))
        case "exit":
            os._exit(int(ground_truth))
        case "segfault":
            ctypes.string_at(0)
        case "fill memory":
            bytearray(4 << 30)  # 4 GiB, which the kernel would give and never has to fill
        case "raise ValueError":
            raise ValueError("ground_truth = '?': not a number")
        case "raise KeyError":
            raise KeyError("odd")
        case "no verdict":
            return 1.0  # type: ignore[return-value]
        case "print":
            print("x" * 100_000, flush=True)
            os.write(1, b"more\n")
            sys.stdin.read()
    return Verdict("right", response_text, parts={"pid": os.getpid()})


def share(response_text: str, ground_truth: str, extra_info: Mapping[str, object]) -> object:
    """What a user's function may return, and what not."""
    return {
        "yes": True,
        "no": False,
        "half": 0.5,
        "all": 1,
        "verdict": Verdict("no_answer"),
        "percent": 50,
        "nan": float("nan"),
        "text": "right",
        "nothing": None,
    }[response_text]


async def asynchronous(text: str, truth: str, extra_info: Mapping[str, object]) -> bool:
    """No grader: it would have to be awaited."""
    return True


NOT_A_FUNCTION = 3
