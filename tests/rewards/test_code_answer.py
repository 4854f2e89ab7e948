"""Which block of a final turn is the program."""

import time

import pytest

from sod_mcore.rewards.code.answer import final_program
from tests.rewards.code_helpers import fenced


@pytest.mark.parametrize(
    "label",
    ["python", "py", "", "Python", "PY", "python3", "py3", 'python title="a.py"', " python  x "],
)
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
        "```text python\nprint(1)\n```",
        "Answer: ```print(1)```",
        "~~~python\nprint(1)\n```",
        "````python\nprint(1)\n```",
        "a ~~~python\nprint(1)\n~~~",
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


GOOD, OTHER = "print(1)\n", "print(2)\n"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        # An opening fence behind other text.
        ("Answer: ```python\nprint(1)\n```", GOOD),
        ("Answer:```\nprint(1)\n```", GOOD),
        ("**Answer** ```py title='a'\nprint(1)\n```", GOOD),
        ("1. ```python\n   print(1)\n   ```", GOOD),
        ("- ~~~python\n  print(1)\n  ~~~", GOOD),
        # A closing fence at the end of a line of code.
        ("```python\nprint(1)```", GOOD),
        ("```python\nprint(1)```  \nIt is right.", GOOD),
        ("```python\nprint(1)```\nIt prints:\n```\n1\n```", GOOD),
        ("Answer: ```python\nprint(1)```\n", GOOD),
        ("~~~\nprint(1)~~~", GOOD),
        # No closing fence, though it looks like one.
        ("```python\nprint(1)  # not in ```\nx\n```", "print(1)  # not in ```\nx\n"),
        ("```python\nprint('```')\n```", "print('```')\n"),
        ("```python\n# ```x```\nx\n```", "# ```x```\nx\n"),
        ("```python\nx = 1 # ```python\ny\n```", "x = 1 # ```python\ny\n"),
        ("````python\nprint(1)\n```\n````", "print(1)\n```\n"),
        ("````python\n```python\n````", "```python\n"),
        ("~~~~python\nprint(1)\n~~~\n```\n~~~~~", "print(1)\n~~~\n```\n"),
        ("```python\n~~~\n```", "~~~\n"),
        # Fences of other forms.
        ("````python\nprint(1)\n````", GOOD),
        ("```python\nprint(1)\n````", GOOD),
        ("~~~python\nprint(1)\n~~~", GOOD),
        # Fences in a text do not turn inside out what follows.
        ("Here: ```python\nprint(2)\n```\nBetter:\n```python\nprint(1)\n```", GOOD),
        ("I write ```python\n\n```python\nprint(1)\n```", GOOD),
        ("I write ```python blocks now.\n```\nprint(1)\n```", GOOD),
        ("It ends with ```\n```\nprint(1)\n```\n", GOOD),
        ("Use ```print``` here\n```python\nprint(1)\n```", GOOD),
        ("```python\nprint(2) # cut off\n\nAgain:\n```python\nprint(1)\n```", GOOD),
        ("```python\nprint(1)\n```\nand then ```python\nprint(2", GOOD),
        # The last one counts, one with a mark before others.
        ("```py3\nprint(2)\n```\n~~~python\nprint(1)\n~~~\n```\n1\n```", GOOD),
        ("```\nprint(2)\n```\n```\nprint(1)\n```", GOOD),
    ],
)
def test_fences(text: str, program: str) -> None:
    assert final_program(text) == program
    windows = final_program(f"{text}\n".replace("\n", "\r\n"))
    assert windows is not None
    assert windows.replace("\r", "") == program


DRAFT = "```python\nprint(2)\n```\n"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (DRAFT + "</think>\n```\nprint(1)\n```", GOOD),
        (DRAFT + "So.</think>Answer:\n```\nprint(1)\n```", GOOD),
        (DRAFT + "</think> Answer: ```\nprint(1)\n```", GOOD),
        (DRAFT + "</think>\nhm\n</think>\n```\nprint(1)\n```", GOOD),
        ("```\nprint(2)\n</think>\n```python\nprint(1)\n```", GOOD),
        ("```python\nprint(2)\n```</think>\n```\nprint(1)\n```", GOOD),
        ("<think>\n" + DRAFT + "</think>\n```\nprint(1)\n```", GOOD),
        # No end of a draft: nothing behind it, within a block, or only mentioned.
        (DRAFT + "</think>\nThat was it.", OTHER),
        (DRAFT + "</think>\n```text\n5\n```", OTHER),
        ("```python\ns = '''\n</think>\n'''\n```", "s = '''\n</think>\n'''\n"),
        (DRAFT + "It prints no `</think>` but\n```\n2\n```", OTHER),
    ],
)
def test_a_draft_that_the_template_opened(text: str, program: str) -> None:
    assert final_program(text) == program


@pytest.mark.parametrize(
    "line",
    ["x```", "```x", "```", "a ```b", "</think>", "`" * 50, "~~~ `", "```python", "```a b=`"],
)
def test_many_fences_are_read_quickly(line: str) -> None:
    started = time.monotonic()
    final_program(f"{line}\n" * 30_000)
    final_program(line * 30_000)
    assert time.monotonic() - started < 10
