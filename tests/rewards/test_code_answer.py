"""Which block of a final turn is the program."""

import pytest

from sod_mcore.rewards.code_answer import final_program
from tests.rewards.code_helpers import fenced


@pytest.mark.parametrize("label", ["python", "py", "", "Python", "python3"])
def test_labels(label: str) -> None:
    assert final_program(fenced("x = 1", label)) == "x = 1\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "print(1)",
        "`print(1)`",
        "```python\nprint(1)\n",  # cut off
        "```text\nprint(1)\n```",
        "```cpp\nint main() {}\n```",
        "<think>\n```python\nprint(1)\n```\n</think>\nI give up.",
        "<think>\n```python\nprint(1)\n```\nand so on",
    ],
)
def test_no_program(text: str) -> None:
    assert final_program(text) is None


def test_the_last_block_counts() -> None:
    assert final_program(fenced("first = 1") + "\nBetter:\n" + fenced("last = 2")) == "last = 2\n"


def test_an_output_in_a_block_without_a_mark_is_not_the_program() -> None:
    assert final_program(fenced("print(5)") + "\n```\n5\n```\n") == "print(5)\n"


def test_escapes_stay_as_they_are() -> None:
    """Bug B2 of the reference: it turned these two characters into a line break."""
    program = r'print("\n".join(["a\tb", "\\n"]))'
    assert final_program(fenced(program)) == program + "\n"


def test_only_a_leading_think_block_is_passed_over() -> None:
    """Bug B7 of the reference: it cut at every </think>."""
    program = 'print("</think>")\nprint("<think>")'
    thinking = "<think>\n" + fenced("draft = 1") + "\n</think>\n\n"
    assert final_program(thinking + fenced(program)) == program + "\n"


def test_fences_inside_of_a_string_literal() -> None:
    program = 'fence = "```"\nprint(f"{fence}python")'
    assert final_program(fenced(program)) == program + "\n"


def test_a_block_in_a_list_loses_the_indentation_of_its_fence() -> None:
    text = "1. So:\n   ```python\n   if x:\n       y()\n\n   ```\n"
    assert final_program(text) == "if x:\n    y()\n\n"


def test_a_body_keeps_its_indentation() -> None:
    assert final_program("```python\n    return 1\n```") == "    return 1\n"


def test_windows_line_ends() -> None:
    assert final_program("```python\r\nx = 1\r\n```\r\n") == "x = 1\r\n"
