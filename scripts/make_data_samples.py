"""Writes small samples in the schemas of the published data sets, for tests and for a first look.

    python scripts/make_data_samples.py --output runs/data_samples [--faulty]

Column names and types are those of the published files; the problems are made up. ``--faulty``
adds files in which single rows are wrong, each in one way.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sod_mcore.files import atomic_folder

Row = dict[str, Any]

_TEXT = pa.string()
_TEXTS = pa.list_(_TEXT)
_FUNCTION = pa.struct([("name", _TEXT), ("arguments", pa.struct([("code", _TEXT)]))])
_CALL = pa.struct([("type", _TEXT), ("function", _FUNCTION)])
_MESSAGE = pa.struct([("role", _TEXT), ("content", _TEXT), ("tool_calls", pa.list_(_CALL))])
_CODE = pa.struct([("description", _TEXT), ("type", _TEXT)])
_PARAMETERS = pa.struct(
    [("properties", pa.struct([("code", _CODE)])), ("required", _TEXTS), ("type", _TEXT)]
)
_TOOL = pa.struct(
    [
        ("type", _TEXT),
        (
            "function",
            pa.struct([("name", _TEXT), ("description", _TEXT), ("parameters", _PARAMETERS)]),
        ),
    ]
)
SFT_SCHEMA = pa.schema(
    [
        ("messages", pa.list_(_MESSAGE)),
        ("tools", pa.list_(_TOOL)),
        ("enable_thinking", pa.bool_()),
    ]
)
RL_SCHEMA = pa.schema(
    [
        ("data_source", _TEXT),
        ("prompt", pa.list_(pa.struct([("role", _TEXT), ("content", _TEXT)]))),
        ("ability", _TEXT),
        ("reward_model", pa.struct([("ground_truth", _TEXT), ("style", _TEXT)])),
        ("extra_info", pa.struct([("index", pa.int64())])),
    ]
)
EVALUATION_SCHEMAS = {
    "aime2024": pa.schema([("ID", _TEXT), ("Problem", _TEXT), ("Answer", pa.int64())]),
    "aime2025": pa.schema([("problem", _TEXT), ("answer", _TEXT)]),
    "gpqa_diamond": pa.schema([("problem", _TEXT), ("solution", _TEXT), ("domain", _TEXT)]),
    "livecodebench_v6": pa.schema(
        [("problem", _TEXT), ("ability", _TEXT), ("reward_model", _TEXT), ("extra_info", _TEXT)]
    ),
}

_INTERPRETER = {
    "type": "function",
    "function": {
        "name": "code_interpreter",
        "description": "A tool for executing code.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The code to execute."}},
            "required": ["code"],
        },
    },
}
_SUM_TESTS = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
# Arguments are a list in TACO, and JSON text in LiveCodeBench.
_DOUBLE_TESTS = {"inputs": [[3], [5]], "outputs": [6, 10], "fn_name": "double"}
_DOUBLE_TEXTS = {"inputs": ["3", "5"], "outputs": ["6", "10"], "fn_name": "double"}
_LEETCODE_TESTS = {
    "entry_point": "Solution().double",
    "import_prefix": "from typing import *\n",
    "test_code": "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(5) > 9",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder; must not exist")
    parser.add_argument("--faulty", action="store_true", help="add files with wrong rows")
    options = parser.parse_args(arguments)
    with atomic_folder(options.output) as folder:
        write_samples(folder)
        if options.faulty:
            write_faulty_samples(folder)


def write_samples(folder: Path) -> None:
    """Write one file in each schema."""
    _write(folder / "sft_3k.parquet", sft_rows(), SFT_SCHEMA)
    _write(folder / "rl_30k.parquet", rl_rows(), RL_SCHEMA)
    for name, rows in evaluation_rows().items():
        _write(folder / f"{name}.parquet", rows, EVALUATION_SCHEMAS[name])
    _write_lines(folder / "humaneval.jsonl", [human_eval_row()])


def write_faulty_samples(folder: Path) -> None:
    """Write files that hold, after a good row, rows that are wrong in one way each."""
    good = rl_rows()[0]
    rows: list[Row | str] = [
        good,
        {key: value for key, value in good.items() if key != "data_source"},
        {**good, "prompt": "What is 1 + 2?"},
        {**good, "reward_model": {"ground_truth": 3, "style": "rule"}},
        {**good, "extra_info": "{not JSON"},
        {**rl_rows()[3], "reward_model": {"ground_truth": "{'inputs': [", "style": "rule"}},
        {"Problem": "What is 2 + 3?", "Answer": None},
        {"question": "What is 2 + 3?"},
        '{"data_source": "math_dapo", "prompt": [',
        {**good, "prompt": [_message("user", "What is 1 + 1? " * 200)]},
    ]
    _write_lines(folder / "faulty_prompts.jsonl", rows)
    _write_lines(folder / "faulty_sft.jsonl", _faulty_conversations())


def sft_rows() -> list[Row]:
    """Conversations: with calls, of which one fails, and without; thinking said and not said."""
    failing, mended = _call("print(12 * 12"), _call("print(12 * 12)")
    traceback = "SyntaxError: '(' was never closed"
    return [
        {
            "messages": [
                _message("user", "What is 12 times 12?"),
                _message("assistant", "I calculate it.", [failing]),
                _message("tool", traceback),
                _message("assistant", "", [mended]),
                _message("tool", "144"),
                _message("assistant", r"The answer is \boxed{144}."),
            ],
            "tools": [_INTERPRETER],
            "enable_thinking": False,
        },
        {
            "messages": [_message("user", "Say yes."), _message("assistant", "Yes.")],
            "tools": [_INTERPRETER],
            "enable_thinking": None,
        },
    ]


def rl_rows() -> list[Row]:
    """A row of each data_source of the training set, in an order that mixes them."""
    return [
        _rl_row(0, "math_dapo", "What is 1 + 2? Put the answer into a box.", "3"),
        _rl_row(1, "train-math-deepscaler", "What is 5 - 2?", "3"),
        _rl_row(2, "mega-science", "How many metres are 3 km?", "3000"),
        _rl_row(3, "train-code-taco-easy", "Add two numbers.", json.dumps(_SUM_TESTS), "code"),
        _rl_row(4, "train-code-taco-easy", "Double it.", json.dumps(_DOUBLE_TESTS), "code"),
        _rl_row(5, "train-code-leetcode-easy", "Double it.", json.dumps(_LEETCODE_TESTS), "code"),
    ]


def evaluation_rows() -> dict[str, list[Row]]:
    """Rows of the four evaluation sets, by the names of their files."""
    choices = "Which of these is a metal?\nA. Iron\nB. Neon\nC. Argon\nD. Sulphur"
    return {
        "aime2024": [{"ID": "2024-I-1", "Problem": "What is 100 + 104?", "Answer": 204}],
        "aime2025": [{"problem": "What is 7 times 10?", "answer": "70"}],
        "gpqa_diamond": [{"problem": choices, "solution": "A", "domain": "Chemistry"}],
        "livecodebench_v6": [
            _live_code_bench_row(0, "Print the sum of two numbers.", _SUM_TESTS),
            _live_code_bench_row(1, "Return twice the number.", _DOUBLE_TEXTS),
        ],
    }


def human_eval_row() -> Row:
    """A row of HumanEval's JSONL file."""
    return {
        "task_id": "HumanEval/0",
        "prompt": 'def double(number: int) -> int:\n    """Twice the number."""\n',
        "entry_point": "double",
        "canonical_solution": "    return 2 * number\n",
        "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    }


def _faulty_conversations() -> list[Row | str]:
    good = sft_rows()[0]
    question, answer = _message("user", "What is 1 + 2?"), _message("assistant", "3")
    bad_call = {"type": "function", "function": {"name": "code_interpreter", "arguments": "{code"}}
    return [
        good,
        {**good, "messages": [question]},
        {**good, "messages": [{"content": "no role"}, answer]},
        {**good, "messages": [question, _message("assistant", "", [bad_call]), answer]},
        {**good, "messages": [question, _message("assistant", "", [{"code": "1 + 2"}]), answer]},
        {**good, "enable_thinking": "no"},
        {**good, "tools": "code_interpreter"},
        "[]",
    ]


def _message(role: str, content: str, tool_calls: list[Row] | None = None) -> Row:
    return {"role": role, "content": content, "tool_calls": tool_calls}


def _call(code: str) -> Row:
    function = {"name": "code_interpreter", "arguments": {"code": code}}
    return {"type": "function", "function": function}


def _rl_row(index: int, source: str, question: str, truth: str, ability: str = "math") -> Row:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": question}],
        "ability": ability,
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": index},
    }


def _live_code_bench_row(index: int, problem: str, tests: Row) -> Row:
    return {
        "problem": problem,
        "ability": "code",
        "reward_model": json.dumps({"ground_truth": tests, "style": "rule"}),
        "extra_info": json.dumps({"index": index}),
    }


def _write(path: Path, rows: list[Row], schema: pa.Schema) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def _write_lines(path: Path, rows: Sequence[Row | str]) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
