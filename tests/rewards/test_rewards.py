"""Extraction, penalty and choice of verifiers, against the vectors M1 and O1 of the method."""

import pytest

from sod_mcore.rewards import (
    ReasoningGymVerifier,
    VerifierRegistry,
    extract_last_boxed,
    overlong_penalty,
)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{12}", "12"),
        (r"\boxed{ 12}", " 12"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}.", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{a \\}", r"a \\"),
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{3}}", "3"),
        ("no box", None),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{\frac{1}{2}", None),
        ("\\boxed{2\\", None),
        ("", None),
    ],
)
def test_extract_last_boxed(text: str, content: str | None) -> None:
    assert extract_last_boxed(text) == content


@pytest.mark.parametrize(
    ("length", "buffer", "penalty"),
    [
        (19456, 1024, 0.0),
        (19457, 1024, -0.000977),
        (19968, 1024, -0.5),
        (20480, 1024, -1.0),
        (18432, 4096, -0.5),
        (0, 1024, 0.0),
        (30000, 1024, -1.0),
    ],
)
def test_overlong_penalty(length: int, buffer: int, penalty: float) -> None:
    assert overlong_penalty(length, 20480, buffer) == pytest.approx(penalty, abs=5e-7)
    assert overlong_penalty(length, 20480, buffer, factor=0.5) == pytest.approx(
        penalty / 2, abs=5e-7
    )


@pytest.mark.parametrize("buffer", [0, -1, 20481])
def test_overlong_penalty_needs_a_buffer(buffer: int) -> None:
    with pytest.raises(ValueError, match=f"buffer_length = {buffer}"):
        overlong_penalty(10, 20480, buffer)


def test_registry_takes_the_longest_prefix() -> None:
    general, special = ReasoningGymVerifier(), ReasoningGymVerifier()
    registry = VerifierRegistry({"reasoning_gym": general, "reasoning_gym/chain": special})
    assert registry.for_source("reasoning_gym/chain_sum") is special
    assert registry.for_source("reasoning_gym/products") is general
    with pytest.raises(ValueError, match=r"data_source = 'math'.*'reasoning_gym'"):
        registry.for_source("math")
