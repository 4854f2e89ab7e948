"""The samples have the published columns; each faulty row is wrong in the way that it is meant."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scripts.make_data_samples import main, sft_rows
from sod_mcore.data.prompts import judge_prompts
from sod_mcore.data.sft import judge_conversations
from sod_mcore.tools.code_interpreter import code_interpreter_schema

COLUMNS = {
    "sft_3k": ["messages", "tools", "enable_thinking"],
    "rl_30k": ["data_source", "prompt", "ability", "reward_model", "extra_info"],
    "aime2024": ["ID", "Problem", "Answer"],
    "aime2025": ["problem", "answer"],
    "gpqa_diamond": ["problem", "solution", "domain"],
    "livecodebench_v6": ["problem", "ability", "reward_model", "extra_info"],
}


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    main(["--output", str(tmp_path / "samples"), "--faulty"])
    return tmp_path / "samples"


def test_samples_are_good_and_have_the_published_columns(samples: Path) -> None:
    for name, columns in COLUMNS.items():
        path = samples / f"{name}.parquet"
        assert pq.read_schema(path).names == columns
        judge = judge_conversations if name == "sft_3k" else judge_prompts
        assert [row.problem for row in judge(path) if row.problem] == []
    assert pq.read_schema(samples / "livecodebench_v6.parquet").field("reward_model").type == (
        pa.string()
    )


def test_the_sample_conversations_show_the_tool_that_is_run() -> None:
    assert all(row["tools"] == [code_interpreter_schema()] for row in sft_rows())


@pytest.mark.parametrize(
    ("name", "beginnings"),
    [
        (
            "faulty_prompts",
            [
                "",
                "data_source: is None",
                "prompt: is 'What",
                "reward_model.ground_truth: is 3;",
                "extra_info: is '{not JSON'",
                "reward_model.ground_truth: is ",
                "Answer: is None",
                "columns: are ['question']",
                "line 9: is ",
                "",  # too long, which only a tokenizer shows
            ],
        ),
        (
            "faulty_sft",
            [
                "",
                "messages: must end with an assistant",
                "messages[0].role: is None",
                "messages[1].tool_calls[0].function.arguments: is '{code'",
                "messages[1].tool_calls[0]: is {'code'",
                "enable_thinking: is 'no'",
                "tools: is 'code_interpreter'",
                "line 8: is []",
            ],
        ),
    ],
)
def test_every_faulty_row_is_judged_by_itself(
    samples: Path, name: str, beginnings: list[str]
) -> None:
    judge = judge_conversations if name == "faulty_sft" else judge_prompts
    problems = [row.problem for row in judge(samples / f"{name}.jsonl")]
    for problem, beginning in zip(problems, beginnings, strict=True):
        assert problem.startswith(beginning)
        assert bool(problem) == bool(beginning)
