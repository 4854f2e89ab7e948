"""Rewards of finished trajectories: graders, the choice between them, and shaping."""

from sod_mcore.rewards.boxed import extract_last_boxed
from sod_mcore.rewards.interface import (
    Category,
    Grader,
    RewardResult,
    RewardScale,
    Verdict,
    Verifier,
)
from sod_mcore.rewards.pool import GraderPool, PooledVerifier
from sod_mcore.rewards.registry import SourceTable, VerifierRegistry, check_row, find_grader
from sod_mcore.rewards.shaping import overlong_penalty, shape, tool_use_shaping

__all__ = [
    "Category",
    "Grader",
    "GraderPool",
    "PooledVerifier",
    "RewardResult",
    "RewardScale",
    "SourceTable",
    "Verdict",
    "Verifier",
    "VerifierRegistry",
    "check_row",
    "extract_last_boxed",
    "find_grader",
    "overlong_penalty",
    "shape",
    "tool_use_shaping",
]
