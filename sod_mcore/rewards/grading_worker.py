"""What a grading process runs: ``python -m sod_mcore.rewards.grading_worker PARENT BYTES SECONDS``.

It reads pickled graders and their arguments from its input and writes JSON lines to its output, so
that nothing which an answer could have brought about in here is unpickled by the parent. It is a
program of its own and not a ``multiprocessing`` child: those import the parent's main module again,
which is a training script with torch and Megatron.

A grading that takes too much CPU time is ended by the kernel: SIGPROF is left at its default, since
a handler would wait for the end of a call such as ``9**9**9``.
"""

import dataclasses
import json
import logging
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from typing import BinaryIO

from sod_mcore.platform.parent_death import die_with_parent
from sod_mcore.rewards.interface import Grader, Verdict
from sod_mcore.rewards.worker_handle import FRAME_LENGTH, LONGEST_REPLY

_LONGEST_PREDICTION = 1000
_LONGEST_MESSAGE = 2000

_Reply = Callable[..., None]


def main() -> None:
    """Answer requests until the input ends."""
    parent, memory_bytes = (int(argument) for argument in sys.argv[1:3])
    cpu_seconds = float(sys.argv[3])
    die_with_parent(parent)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.WARNING)  # libraries complain about answers, which is what they are for
    requests, replies = _take_standard_streams()

    def reply(**fields: object) -> None:
        replies.write(json.dumps(fields).encode() + b"\n")
        replies.flush()

    graders: dict[bytes, Grader] = {}
    reply(is_ready=True)
    while (pickled_grader := _read_frame(requests)) is not None:
        arguments = _read_frame(requests)
        if arguments is None:
            return
        if _load(pickled_grader, graders, reply):
            _grade(graders[pickled_grader], arguments, cpu_seconds, reply)


def _take_standard_streams() -> tuple[BinaryIO, BinaryIO]:
    """The pipes to the parent, hidden from graders: what they print goes to the error stream."""
    requests, replies = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return os.fdopen(requests, "rb"), os.fdopen(replies, "wb")


def _read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame, or None where the input ends."""
    header = stream.read(FRAME_LENGTH.size)
    if len(header) < FRAME_LENGTH.size:
        return None
    length = FRAME_LENGTH.unpack(header)[0]
    frame = stream.read(length)
    return frame if len(frame) == length else None


def _load(pickled: bytes, graders: dict[bytes, Grader], reply: _Reply) -> bool:
    """Unpickle a grader, with the imports that this takes, unless it is here already."""
    try:
        if pickled not in graders:
            graders[pickled] = pickle.loads(pickled)
    except Exception as error:
        reply(failure=_describe(error))
        return False
    return True


def _grade(grader: Grader, pickled_arguments: bytes, cpu_seconds: float, reply: _Reply) -> None:
    response_text, ground_truth, extra_info = pickle.loads(pickled_arguments)
    reply(is_started=True)
    try:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            verdict = grader(response_text, ground_truth, extra_info)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        fields = _as_fields(verdict)
        _refuse_if_too_long(fields, grader)
        reply(verdict=fields)
    except MemoryError:
        raise  # a process that ran out of memory is not used again
    except ValueError as error:
        reply(unusable_row=str(error)[:_LONGEST_MESSAGE])
    except Exception as error:
        reply(failure=_describe(error))


def _as_fields(verdict: object) -> dict[str, object]:
    if not isinstance(verdict, Verdict):
        raise TypeError(f"the grader returned {type(verdict).__name__}, not a Verdict")
    fields = dataclasses.asdict(verdict)
    fields["prediction"] = verdict.prediction[:_LONGEST_PREDICTION]
    return fields


def _refuse_if_too_long(fields: dict[str, object], grader: Grader) -> None:
    size = len(json.dumps({"verdict": fields}))
    if size >= LONGEST_REPLY:
        raise ValueError(
            f"the verdict of the grader {grader!r} takes {size} bytes as JSON; the limit is "
            f"{LONGEST_REPLY}: give it fewer parts"
        )


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]


if __name__ == "__main__":
    main()
