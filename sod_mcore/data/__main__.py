"""Looks at data before a run does: checks a file row by row, or shows one row as tokens.

    python -m sod_mcore.data check FILE [--tokenizer FOLDER] [--max-tokens N] [--sft]
    python -m sod_mcore.data show FILE --row N --tokenizer FOLDER [--sft]

FILE is a Parquet or JSONL file, or hf:NAME[:SPLIT] of a Hugging Face data set.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from sod_mcore.chat import ChatRenderer, TokenizedConversation
from sod_mcore.data.check import (
    LengthRule,
    RowReport,
    conversation_reports,
    prompt_reports,
    summary_lines,
)
from sod_mcore.data.errors import DataError, one_line
from sod_mcore.data.prompts import judge_prompts
from sod_mcore.data.rows import JudgedRow
from sod_mcore.data.sft import Conversation, judge_conversations, tokenize_one
from sod_mcore.data.show import draw_tokens, summary
from sod_mcore.tools.code_interpreter import code_interpreter_schema
from sod_mcore.trajectory import Prompt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 1 if anything is wrong with the data."""
    options = _make_parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except BrokenPipeError:  # whoever reads has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DataError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


def check(options: argparse.Namespace) -> int:
    """Print a report of each row, and the counts."""
    counts: Counter[tuple[str, bool]] = Counter()
    for report in _reports(options):
        counts[report.source, not report.problem] += 1
        if report.problem or not options.only_wrong:
            print(report.lines())
    if not counts:
        raise DataError(f"{options.file}: the file has no rows")
    print(summary_lines(counts))
    return int(any(not is_good for _, is_good in counts))


def show(options: argparse.Namespace) -> int:
    """Print one row as tokens with its loss mask."""
    renderer, tokens = _tokens_of_row(options)
    print(draw_tokens(tokens, renderer.tokenizer, color=_use_color(options)).rstrip("\n"))
    print(f"\n{summary(tokens)}")
    return 0


def _reports(options: argparse.Namespace) -> Iterator[RowReport]:
    rule = None
    if options.tokenizer is not None:
        rule = LengthRule(_renderer_for(options), _tool_schemas(options), options.max_tokens)
    if options.sft:
        return conversation_reports(judge_conversations(options.file, options.rows), rule)
    rows = judge_prompts(options.file, instructions=options.instructions, limit=options.rows)
    return prompt_reports(rows, rule)


def _tokens_of_row(options: argparse.Namespace) -> tuple[ChatRenderer, TokenizedConversation]:
    limit = options.row + 1
    if options.sft:
        conversation = _nth(judge_conversations(options.file, limit), options)
        return _conversation_tokens(conversation, options)
    rows = judge_prompts(options.file, instructions=options.instructions, limit=limit)
    return _prompt_tokens(_nth(rows, options), options)


def _conversation_tokens(
    conversation: Conversation, options: argparse.Namespace
) -> tuple[ChatRenderer, TokenizedConversation]:
    renderer = _renderer_for(options)(conversation.enable_thinking)
    return renderer, tokenize_one(conversation, renderer, None, f"row {options.row}")


def _prompt_tokens(
    prompt: Prompt, options: argparse.Namespace
) -> tuple[ChatRenderer, TokenizedConversation]:
    renderer = _renderer_for(options)(None)
    ids = renderer.render_prompt(prompt.messages, _tool_schemas(options))
    unsampled = np.full(len(ids), -1, dtype=np.int16)
    return renderer, TokenizedConversation(ids, unsampled >= 0, unsampled)


def _nth(rows: Iterator[JudgedRow[Any]], options: argparse.Namespace) -> Any:
    judged = next(itertools.islice(rows, options.row, None), None)
    if judged is None:
        raise DataError(f"{options.file} has no row {options.row}; rows are counted from 0")
    if judged.parsed is None:
        raise DataError(f"{options.file}, row {options.row}, {judged.problem}")
    return judged.parsed


def _renderer_for(options: argparse.Namespace) -> Callable[[bool | None], ChatRenderer]:
    """Renderers by what a row says of enable_thinking; the option overrules the row."""

    @cache
    def renderer(of_row: bool | None) -> ChatRenderer:
        given = options.enable_thinking
        return _open_renderer(options.tokenizer, of_row if given is None else given)

    return renderer


def _open_renderer(folder: Path, enable_thinking: bool | None) -> ChatRenderer:
    if not (folder / "tokenizer.json").is_file():
        raise DataError(
            f"--tokenizer is {folder}: it has no tokenizer.json; give a Hugging Face model folder"
        )
    try:
        return ChatRenderer.from_folder(folder, enable_thinking)
    except ValueError as error:
        raise DataError(f"--tokenizer is {folder}: {one_line(error)}") from error


def _tool_schemas(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.tools is None:
        return [code_interpreter_schema()]
    try:
        schemas = json.loads(options.tools.read_bytes())
    except ValueError as error:
        raise DataError(
            f"--tools is {options.tools}: it is not JSON ({one_line(error)})"
        ) from error
    if not isinstance(schemas, list) or not all(isinstance(item, dict) for item in schemas):
        raise DataError(f"--tools is {options.tools}: a JSON list of tool schemas is needed")
    return schemas


def _use_color(options: argparse.Namespace) -> bool:
    """https://no-color.org, and not where the output is no terminal, unless FORCE_COLOR is set."""
    if options.no_color or os.environ.get("NO_COLOR"):
        return False
    return sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sod_mcore.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    positive = partial(_number, least=1)
    checking = _add_command(commands, "check", check)
    checking.add_argument("--tokenizer", type=Path, help="folder; measures the rows with it")
    checking.add_argument(
        "--max-tokens", "--max-prompt-tokens", type=positive, metavar="N", help="most of a row"
    )
    checking.add_argument("--rows", type=positive, metavar="N", help="check only the first N rows")
    checking.add_argument("--only-wrong", action="store_true", help="print only the wrong rows")
    showing = _add_command(commands, "show", show)
    showing.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    showing.add_argument(
        "--row", type=partial(_number, least=0), default=0, metavar="N", help="which, from 0"
    )
    showing.add_argument("--no-color", action="store_true", help="marks the loss with « and »")
    return parser


def _add_command(commands: Any, name: str, command: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=command.__doc__)
    parser.set_defaults(command=command)
    parser.add_argument("file", metavar="FILE", help="Parquet or JSONL file, or hf:NAME[:SPLIT]")
    parser.add_argument(
        "--sft", action="store_true", help="the rows are conversations, not prompts"
    )
    parser.add_argument("--instructions", choices=("published", "none"), default="published")
    parser.add_argument("--tools", type=Path, metavar="FILE", help="JSON list of tool schemas")
    parser.add_argument("--enable-thinking", type=_truth, metavar="true|false")
    return parser


def _number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}; a whole number from {least} on is needed")
    return int(text)


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}; true or false is needed")
    return text == "true"


if __name__ == "__main__":
    sys.exit(main())
