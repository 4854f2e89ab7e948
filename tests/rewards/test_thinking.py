"""What is left of a final turn without its thinking."""

import pytest

from sod_mcore.rewards.thinking import without_thinking


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("12", "12"),
        ("", ""),
        ("<think>11</think>12", "12"),
        ("\n <think>11</think>\n12", "\n12"),
        ("<think></think>12", "12"),
        ("<think>11</think>12</think>13", "12</think>13"),
        ("<think>11", ""),
        ("11</think>12", "12"),
        ("10</think>11</think>12", "12"),
        ("11</think>", ""),
        ("12 <think>11</think> or 13", "12 <think>11</think> or 13"),
        ("12 <think>", "12 <think>"),
    ],
)
def test_without_thinking(text: str, rest: str) -> None:
    assert without_thinking(text) == rest
