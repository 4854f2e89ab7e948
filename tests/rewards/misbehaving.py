"""Graders that a grading process must survive, or must be killed under."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

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
        case "burn":
            end = time.process_time() + float(ground_truth)
            while time.process_time() < end:
                pass
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "one long call":
            pow(7, 10**10)  # gets to no handler of a signal before its end
        case "long reply":
            time.sleep(float(ground_truth))
            return Verdict("right", parts={f"part {n}": 0.0 for n in range(30_000)})
        case "many parts":
            return Verdict("right", parts={f"part {n}": 0.0 for n in range(100_000)})
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
        "numpy yes": np.bool_(True),
        "numpy half": np.float32(0.5),
        "numpy verdict": Verdict("wrong", "", np.float32(0.5), {"n": np.int64(3)}),  # type: ignore
        "percent": 50,
        "nan": float("nan"),
        "text": "right",
        "nothing": None,
        "numpy text": np.str_("right"),
        "array": np.array([1.0, 0.0]),
    }[response_text]


def wrong_verdict(text: str, truth: str, extra_info: Mapping[str, object]) -> Verdict:
    """Verdicts that are none."""
    match text:
        case "category":
            return Verdict("correct")  # type: ignore[arg-type]
        case "share":
            return Verdict("right", share=5.0)
        case _:
            return Verdict("right", parts={"note": "long"})  # type: ignore[dict-item]


async def asynchronous(text: str, truth: str, extra_info: Mapping[str, object]) -> bool:
    """No grader: it would have to be awaited."""
    return True


NOT_A_FUNCTION = 3
