r"""The program that a final turn hands in: its last fenced block, character by character.

Nothing is unescaped and nothing is parsed. A `"\n"` in a string literal stays what it is, and
hostile source is only ever read by the Python in the sandbox.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_LEADING_THINKING = re.compile(r"\s*<think>.*?(?:</think>|\Z)", re.DOTALL)
_END_OF_THINKING = re.compile(r"""(?<![`'"])</think>(?![`'"])""")
_RUN = re.compile(r"`{3,}|~{3,}")
_INDENTATION = re.compile(r"[ \t]*(?:(?:[-*+]|[0-9]{1,9}[.)])[ \t]+)?")  # of a list item, too
_FENCE_BEFORE_END = re.compile(r"^([ \t]*(?:`{3,}|~{3,}))(?=</think>)", re.MULTILINE)
_INFO = re.compile(r"(?:[\w.+#-]|\{).*")
_INFO_BEHIND_TEXT = re.compile(r"(?:[\w+#-]+(?:[ \t]+[\w-]+=.*|[ \t]*\{.*)?)?")
_PYTHON_LABELS = ("python", "py", "python3", "py3")
_UNLABELLED = ("",)


@dataclass(frozen=True)
class _Fence:
    """Three or more backticks or tildes that may open or close a block.

    Attributes:
        run: the backticks or tildes.
        before: the line up to them.
        info: what follows them, without blanks at its ends.
    """

    run: str
    before: str
    info: str

    @property
    def stands_alone(self) -> bool:
        """Whether nothing is before it on its line but a list item's mark."""
        return _INDENTATION.fullmatch(self.before) is not None

    def opens(self, bare_behind_text: bool) -> bool:
        """Whether it opens a block where none is open."""
        if self.stands_alone:
            return not self.info or _INFO.fullmatch(self.info) is not None
        if self.run[0] == "~" or not (self.info or bare_behind_text):
            return False
        return _INFO_BEHIND_TEXT.fullmatch(self.info) is not None

    def fits(self, opening: "_Fence") -> bool:
        """Whether it is of another one's kind, and at least as long."""
        return self.run.startswith(opening.run)


@dataclass
class _Block:
    """A block; ``text`` is complete when its closing fence has been found."""

    opening: _Fence
    first_line: int
    lines: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """First word of what follows the opening fence."""
        return (self.opening.info.split() or [""])[0].lower()

    @property
    def text(self) -> str:
        """The lines, without the indentation of the opening fence."""
        match = _INDENTATION.match(self.opening.before)
        indentation = match.end() if match else 0
        margins = [min(indentation, len(line) - len(line.lstrip(" \t"))) for line in self.lines]
        pairs = zip(self.lines, margins, strict=True)
        return "".join(line[margin:] + "\n" for line, margin in pairs)


def final_program(response_text: str) -> str | None:
    """The last block marked as Python; where none is, the last one without a mark; or None.

    A block marked as Python comes before a later one without a mark, which often shows the output.
    A block whose fence stays open was cut off and is none. What is a draft is no answer: a leading
    `<think>` block; and, where the chat template has opened it, all up to the last `</think>` that
    stands outside blocks, unquoted, and has a program behind it.
    """
    thinking = _LEADING_THINKING.match(response_text)
    answer = response_text[thinking.end() :] if thinking else response_text
    blocks, ends_of_thinking = _read(_FENCE_BEFORE_END.sub(r"\1\n", answer).split("\n"))
    programs = [block for block in blocks if block.label in (*_PYTHON_LABELS, *_UNLABELLED)]
    if not programs:
        return None
    draft_end = max(
        (line for line in ends_of_thinking if line <= programs[-1].first_line), default=0
    )
    final = [block for block in programs if block.first_line >= draft_end]
    marked = [block for block in final if block.label in _PYTHON_LABELS]
    return (marked or final)[-1].text


def _read(lines: Sequence[str]) -> tuple[list[_Block], list[int]]:
    """The blocks, and the lines outside of them in which thinking ends.

    A bare fence behind other text may open or close a block, or be part of a comment or a text. It
    does not count if a block stays open with such fences and none does without them.
    """
    blocks, ends_of_thinking, is_open = _scan(lines, bare_behind_text=True)
    if is_open:
        others = _scan(lines, bare_behind_text=False)
        if not others[2]:
            blocks, ends_of_thinking, _ = others
    return blocks, ends_of_thinking


def _scan(lines: Sequence[str], bare_behind_text: bool) -> tuple[list[_Block], list[int], bool]:
    """Blocks, ends of thinking, and whether a block is open at the end."""
    blocks: list[_Block] = []
    ends_of_thinking: list[int] = []
    block: _Block | None = None
    for number, line in enumerate(lines):
        fence = _fence(line.rstrip("\r"))
        if block is None:
            if _END_OF_THINKING.search(line):
                ends_of_thinking.append(number)
            if fence is not None and fence.opens(bare_behind_text):
                block = _Block(fence, number)
        elif fence is None or not fence.fits(block.opening):
            block.lines.append(line)
        elif fence.stands_alone and fence.info and fence.opens(bare_behind_text):
            # No closing fence has words behind it: what was open was cut off, or only mentioned.
            block = _Block(fence, number)
        elif not fence.info and (bare_behind_text or not fence.before.strip(" \t")):
            if fence.before.strip(" \t"):
                block.lines.append(fence.before)
            blocks.append(block)
            block = None
        else:
            block.lines.append(line)
    return blocks, ends_of_thinking, block is not None


def _fence(line: str) -> _Fence | None:
    """The fence in a line. Backticks that end on the same line, as of code in a text, are none."""
    runs = list(_RUN.finditer(line))
    if len(runs) != 1:
        return None
    run = runs[0]
    info = line[run.end() :].strip(" \t")
    if "`" in info:
        return None
    return _Fence(run.group(), line[: run.start()], info)
