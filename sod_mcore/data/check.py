"""Says of every row what it would become and what is wrong with it, and counts both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sod_mcore.chat import ChatRenderer
from sod_mcore.data.errors import DataError, FieldError
from sod_mcore.data.lengths import prompt_length
from sod_mcore.data.published import schema_of
from sod_mcore.data.rows import JudgedRow
from sod_mcore.data.sft import Conversation, tokenize_one
from sod_mcore.data.show import summary
from sod_mcore.rewards import SourceTable, check_row
from sod_mcore.trajectory import Prompt

_LINE_CHARACTERS = 88
_WITHOUT_SOURCE = "(no data_source)"
_UNREADABLE = "(unreadable)"
# A run takes conversations of its own chat.enable_thinking only, and those that do not say.
_THINKING = {
    True: "enable_thinking=true",
    False: "enable_thinking=false",
    None: "enable_thinking not said",
}


@dataclass(frozen=True)
class RowReport:
    """What is printed about one row.

    Attributes:
        number: its position in the file.
        schema: the schema that it was read by.
        source: what the summary counts it under: its data_source, or its enable_thinking.
        details: name and value of what it would become.
        problem: what is wrong with it; empty for a good row.
    """

    number: int
    schema: str
    source: str
    details: tuple[tuple[str, str], ...] = ()
    problem: str = ""

    def lines(self) -> str:
        """The report as lines, without the last line break."""
        rows = [*self.details, *([("WRONG", self.problem)] if self.problem else [])]
        head = f"row {self.number}  {self.schema}  {self.source}"
        return "\n".join([head, *(f"  {name:<8} {value}" for name, value in rows)])


@dataclass(frozen=True)
class LengthRule:
    """How rows are measured.

    Attributes:
        renderer_for: the renderer for a value of enable_thinking.
        tool_schemas: shown with every prompt; conversations bring their own.
        max_tokens: most tokens of a row; None for no limit.
    """

    renderer_for: Callable[[bool | None], ChatRenderer]
    tool_schemas: Sequence[dict[str, Any]]
    max_tokens: int | None = None


def prompt_reports(
    rows: Iterable[JudgedRow[Prompt]], rule: LengthRule | None
) -> Iterator[RowReport]:
    """A report for each row of a prompt file; without ``rule`` nothing is measured."""
    for judged in rows:
        schema = _schema_name(judged.row)
        if judged.parsed is None:
            source = str(judged.row.get("data_source") or _WITHOUT_SOURCE)
            yield RowReport(judged.number, schema, source, (), judged.problem)
            continue
        prompt = judged.parsed
        verifier, problem = _verifier(prompt)
        details = [
            ("prompt", _beginning(str(prompt.messages[-1]["content"]))),
            ("answer", _beginning(prompt.ground_truth)),
            ("verifier", verifier),
        ]
        if rule is not None:
            length, too_long = _measure_prompt(prompt, rule)
            details.append(("length", length))
            problem = problem or too_long
        yield RowReport(judged.number, schema, prompt.data_source, tuple(details), problem)


def conversation_reports(
    rows: Iterable[JudgedRow[Conversation]], rule: LengthRule | None
) -> Iterator[RowReport]:
    """A report for each row of an SFT file; without ``rule`` nothing is measured."""
    for judged in rows:
        report = RowReport(judged.number, "sft", _UNREADABLE, (), judged.problem)
        if judged.parsed is not None:
            report = _conversation_report(judged.number, judged.parsed, rule)
        yield report


def summary_lines(counts: Counter[tuple[str, bool]]) -> str:
    """The counts as lines; the keys are source and whether the row is good."""
    good = sum(count for (_, is_good), count in counts.items() if is_good)
    lines = [f"{counts.total()} rows: {good} good, {counts.total() - good} wrong"]
    for source in sorted({source for source, _ in counts}):
        wrong = counts[source, False]
        lines.append(f"  {source:<24} {counts[source, True]} good, {wrong} wrong")
    return "\n".join(lines)


def _verifier(prompt: Prompt) -> tuple[str, str]:
    """The built-in verifier of a row's source, and what it finds wrong with the row."""
    try:
        name = SourceTable().name_for(prompt.data_source)
    except ValueError:
        return "none built in: reward.verifiers must name one for this source", ""
    try:
        check_row(name, prompt.ground_truth, prompt.extra_info)
    except ValueError as error:
        return name, str(error)
    return name, ""


def _measure_prompt(prompt: Prompt, rule: LengthRule) -> tuple[str, str]:
    renderer = rule.renderer_for(None)
    try:
        length = prompt_length(prompt, renderer, rule.tool_schemas)
    except DataError as error:
        return "unknown", str(error)
    without = prompt_length(prompt, renderer, [])
    text = f"{length} tokens, {length - without} of them tool schemas"
    if rule.max_tokens is None or length <= rule.max_tokens:
        return text, ""
    problem = f"{length} tokens with the tool schemas, data.max_prompt_tokens is {rule.max_tokens}"
    return text, f"{problem}; raise it, or set data.overlong_prompts=drop"


def _conversation_report(
    number: int, conversation: Conversation, rule: LengthRule | None
) -> RowReport:
    roles = Counter(message["role"] for message in conversation.messages)
    asked = [m["content"] for m in conversation.messages if m["role"] == "user"]
    details = [
        ("prompt", _beginning(asked[0] if asked else "(no user message)")),
        ("messages", ", ".join(f"{count} {role}" for role, count in roles.items())),
    ]
    problem = ""
    if rule is not None:
        length, problem = _measure_conversation(conversation, rule)
        details.append(("length", length))
    source = _THINKING[conversation.enable_thinking]
    return RowReport(number, "sft", source, tuple(details), problem)


def _measure_conversation(conversation: Conversation, rule: LengthRule) -> tuple[str, str]:
    limit = rule.max_tokens
    renderer = rule.renderer_for(conversation.enable_thinking)
    try:
        tokens = tokenize_one(conversation, renderer, None, "the conversation")
    except DataError as error:
        return "unknown", str(error)
    problem = ""
    if limit is not None and len(tokens.token_ids) > limit:
        problem = (
            f"{len(tokens.token_ids)} tokens, the limit is {limit}; raise it or remove the row"
        )
    elif not tokens.loss_mask.any():
        problem = 'every turn says "loss": false, so that nothing is trained; remove the row'
    return summary(tokens), problem


def _schema_name(row: dict[str, Any]) -> str:
    try:
        return schema_of(row).name
    except FieldError:
        return "unknown"


def _beginning(text: str) -> str:
    """In one line: with instructions, the first line of every prompt is the same."""
    line = " ".join(text[: 4 * _LINE_CHARACTERS].split())
    is_whole = len(text) <= 4 * _LINE_CHARACTERS and len(line) <= _LINE_CHARACTERS
    return line if is_whole else line[:_LINE_CHARACTERS] + " ..."
