"""Rewards of finished trajectories: verifiers, the choice between them, and shaping."""

from sod_mcore.rewards.boxed import extract_last_boxed
from sod_mcore.rewards.interface import RewardResult, Verifier
from sod_mcore.rewards.overlong import overlong_penalty
from sod_mcore.rewards.reasoning_gym import ReasoningGymVerifier
from sod_mcore.rewards.registry import VerifierRegistry

__all__ = [
    "ReasoningGymVerifier",
    "RewardResult",
    "Verifier",
    "VerifierRegistry",
    "extract_last_boxed",
    "overlong_penalty",
]
