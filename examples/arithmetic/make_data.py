"""Writes the data of the arithmetic example: prompts to train and evaluate on, demonstrations.

    python -m examples.arithmetic.make_data --output runs/arithmetic/data

Files: ``train.parquet`` and ``eval.parquet`` (prompts), ``sft_copy.parquet`` (single turns that
practise copying), ``sft_teacher.parquet`` and ``sft_student.parquet`` (demonstrations). Problems
come from one stream that repeats no question, so evaluation is disjoint from the rest; this is
checked again on what was written.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from examples.arithmetic.command_line import load_settings, make_parser
from examples.arithmetic.demonstrations import TOOL, copy_exercise, demonstrate, without_answer
from examples.arithmetic.problems import Problem, problem_stream
from examples.arithmetic.settings import AgentHabits, DataSettings
from sod_mcore.data import assert_disjoint, question_text, read_conversations, read_prompts
from sod_mcore.files import atomic_folder

Row = dict[str, Any]

_TEXT = pa.string()
_FUNCTION = pa.struct([("name", _TEXT), ("arguments", pa.struct([("code", _TEXT)]))])
_MESSAGE = pa.struct(
    [
        ("role", _TEXT),
        ("content", _TEXT),
        ("tool_calls", pa.list_(pa.struct([("type", _TEXT), ("function", _FUNCTION)]))),
        ("loss", pa.bool_()),
    ]
)
SFT_SCHEMA = pa.schema(
    [
        ("messages", pa.list_(_MESSAGE)),
        ("tools", pa.infer_type([[TOOL]])),
    ]
)
PROMPT_SCHEMA = pa.schema(
    [
        ("data_source", _TEXT),
        ("prompt", pa.list_(pa.struct([("role", _TEXT), ("content", _TEXT)]))),
        ("ability", _TEXT),
        ("reward_model", pa.struct([("ground_truth", _TEXT), ("style", _TEXT)])),
        (
            "extra_info",
            pa.struct(
                [
                    ("index", pa.int64()),
                    ("dataset", _TEXT),
                    ("entry", _TEXT),
                    ("family", _TEXT),
                    ("hint", _TEXT),
                ]
            ),
        ),
    ]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the data unless they exist."""
    parser = make_parser(str(__doc__), "folder that receives the Parquet files")
    options = parser.parse_args(arguments)
    settings = load_settings(options).data
    if options.output.exists():
        print(f"{options.output} exists; nothing to do")
        return
    with atomic_folder(options.output) as folder:
        write_data(folder, settings)
        check_disjoint(folder)


def write_data(folder: Path, settings: DataSettings) -> None:
    """Write the five files into ``folder``."""
    stream = problem_stream(settings.seed, settings.families)
    rng = random.Random(settings.seed)

    def problems(count: int, what: str) -> Iterator[Problem]:
        return iter(tqdm(itertools.islice(stream, count), total=count, desc=what))

    def demonstrations(habits: AgentHabits, what: str) -> Iterator[Row]:
        for problem in problems(habits.conversations, what):
            yield {"messages": demonstrate(problem, habits, rng), "tools": [TOOL]}

    def exercises() -> Iterator[Row]:
        for problem in problems(settings.copy_rows, "copy"):
            yield {"messages": copy_exercise(problem, settings.copy_kinds, rng), "tools": None}

    for name, count in (("eval", settings.eval_prompts), ("train", settings.train_prompts)):
        rows = [prompt_row(p, i) for i, p in enumerate(problems(count, name))]
        pq.write_table(pa.Table.from_pylist(rows, PROMPT_SCHEMA), folder / f"{name}.parquet")
    _write_sft(folder / "sft_copy.parquet", exercises())
    _write_sft(folder / "sft_teacher.parquet", demonstrations(settings.teacher, "teacher"))
    _write_sft(folder / "sft_student.parquet", demonstrations(settings.student, "student"))


def prompt_row(problem: Problem, index: int) -> Row:
    """A row of the reinforcement-learning schema."""
    return {
        "data_source": "reasoning_gym",
        "prompt": [{"role": "user", "content": problem.question}],
        "ability": "math",
        "reward_model": {"ground_truth": problem.answer, "style": "rule"},
        "extra_info": {
            "index": index,
            "family": problem.family,
            "hint": f"print({problem.steps[0]})",
            **problem.verifier_info,
        },
    }


def check_disjoint(folder: Path) -> None:
    """Read the files back; no question of ``eval.parquet`` may be in another one.

    Raises:
        OverlapError: one is.
    """
    train = {"train": map(question_text, read_prompts(folder / "train.parquet"))}
    sft = {
        name: _questions(folder / f"{name}.parquet")
        for name in ("sft_copy", "sft_teacher", "sft_student")
    }
    assert_disjoint({**train, **sft}, map(question_text, read_prompts(folder / "eval.parquet")))


def _questions(path: Path) -> Iterator[str]:
    for conversation in read_conversations(path):
        for message in conversation.messages:
            if message["role"] == "user":
                yield without_answer(message["content"])


def _write_sft(path: Path, rows: Iterable[Row]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows), SFT_SCHEMA), path)


if __name__ == "__main__":
    main()
