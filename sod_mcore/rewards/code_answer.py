r"""The program that a final turn hands in: its last fenced block, character by character.

Nothing is unescaped and nothing is parsed. A `"\n"` in a string literal stays what it is, and
hostile source is only ever read by the Python in the sandbox.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_THINKING = re.compile(r"\s*<think>.*?(?:</think>|\Z)", re.DOTALL)
_FENCE = re.compile(r"([ \t]*)```[ \t]*(\S*)[ \t]*")
_PYTHON_LABELS = ("python", "py", "python3")


@dataclass(frozen=True)
class _Block:
    label: str
    text: str


def final_program(response_text: str) -> str | None:
    """The last block marked as Python; where none is, the last one without a mark; or None.

    A block marked as Python comes before a later one without a mark, which often shows the output.
    A leading `<think>` block is passed over, as a draft in it is no answer; a block whose fence
    stays open was cut off and is none.
    """
    thinking = _THINKING.match(response_text)
    answer = response_text[thinking.end() :] if thinking else response_text
    blocks = list(_blocks(answer))
    for labels in (_PYTHON_LABELS, ("",)):
        programs = [block.text for block in blocks if block.label in labels]
        if programs:
            return programs[-1]
    return None


def _blocks(text: str) -> Iterator[_Block]:
    """Fenced blocks. Fences stand on lines of their own, so those in string literals do not end a
    block; a fence's indentation, as of a list item, is taken off its lines."""
    label: str | None = None
    indentation = 0
    lines: list[str] = []
    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line.rstrip("\r"))
        if label is None and fence is not None:
            label, indentation, lines = fence[2].lower(), len(fence[1]), []
        elif label is not None and fence is not None and not fence[2]:
            yield _Block(label, "".join(lines))
            label = None
        elif label is not None:
            margin = min(indentation, len(line) - len(line.lstrip(" \t")))
            lines.append(line[margin:] + "\n")
