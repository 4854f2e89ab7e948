"""What an exception at the end of a run means: one line, and whether this rank is to blame."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sod_mcore.config import ConfigError
from sod_mcore.data.errors import DataError
from sod_mcore.data.overlap import OverlapError
from sod_mcore.files import DISK_FULL
from sod_mcore.loop.weight_sync import WeightMismatchError
from sod_mcore.outcome import EXIT_FAILED
from sod_mcore.rollout.pool import RolloutError
from sod_mcore.serving.client.json_http import EngineError
from sod_mcore.serving.client.scoring import ScoringError
from sod_mcore.serving.endpoints import FleetError
from sod_mcore.serving.weights.transfer import WeightUpdateError
from sod_mcore.student.rank_zero import RankZeroError

EXIT_WRONG_SETTING = 2

_WRONG_SETTINGS = (ConfigError, DataError, OverlapError)
_EXPECTED = (
    *_WRONG_SETTINGS,
    EngineError,
    FleetError,
    OSError,
    RolloutError,
    ScoringError,
    WeightMismatchError,
    WeightUpdateError,
)
_LOST_RANK = ("closed by peer", "reset by peer", "remote process exited")
"""What gloo and NCCL say when the process at the other end is gone."""
_TIMED_OUT = ("Timed out waiting", "Watchdog caught collective operation timeout")


@dataclass(frozen=True)
class Cause:
    """Why a rank ends.

    Attributes:
        line: one line for people.
        is_expected: no Python traceback is needed to understand it.
        is_secondary: another rank failed, and this one only noticed.
        is_timeout: this rank waited for another one in vain.
        is_everywhere: every rank finds the same fault, so one of them tells it.
        exit_code: of the process.
    """

    line: str
    is_expected: bool = False
    is_secondary: bool = False
    is_timeout: bool = False
    is_everywhere: bool = False
    exit_code: int = EXIT_FAILED


def cause_of(error: Exception) -> Cause:
    """Classify what ended a rank."""
    text = " ".join(str(error).split())
    if isinstance(error, RankZeroError):
        return Cause(f"rank 0 failed: {text}", is_secondary=True)
    if isinstance(error, RuntimeError) and any(words in text for words in _LOST_RANK):
        return Cause("another rank is gone; its own output tells why", is_secondary=True)
    if isinstance(error, RuntimeError) and any(words in text for words in _TIMED_OUT):
        return Cause(
            "another rank is stuck, stopped or much slower: a collective operation did not end in "
            f"time (run.collective_timeout_seconds, or the deadline of rank 0's work): {text}",
            is_timeout=True,
        )
    if isinstance(error, _WRONG_SETTINGS):
        return Cause(text, is_expected=True, is_everywhere=True, exit_code=EXIT_WRONG_SETTING)
    if isinstance(error, OSError) and error.errno is not None:
        return Cause(_operating_system_line(error), is_expected=True)
    if isinstance(error, _EXPECTED):
        return Cause(text, is_expected=True)
    return Cause(f"{type(error).__name__}: {text}")


def _operating_system_line(error: OSError) -> str:
    line = str(error)
    if error.filename and error.errno:
        line = f"{error.filename}: {os.strerror(error.errno)}"
    if error.errno in DISK_FULL:
        line += "; make room, and the same command continues from its newest checkpoint"
    return line
