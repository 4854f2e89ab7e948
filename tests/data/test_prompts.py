"""Prompt files: good rows become prompts, bad rows are named with file, row and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sod_mcore.data import DataError, PromptSource, question_text, read_prompts
from sod_mcore.trajectory import Prompt


def row(**changes: Any) -> dict[str, Any]:
    return {
        "data_source": "reasoning_gym",
        "prompt": [{"role": "user", "content": "Calculate 1 + 2."}],
        "ability": "math",
        "reward_model": {"ground_truth": "3", "style": "rule"},
        "extra_info": {"index": 0, "entry": "{}"},
        **changes,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_rows_become_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", [row(), row(data_source="mine")])
    assert read_prompts(path) == [
        Prompt(
            messages=({"role": "user", "content": "Calculate 1 + 2."},),
            ground_truth="3",
            data_source=source,
            prompt_id=f"train/{number}",
            extra_info={"index": 0, "entry": "{}"},
        )
        for number, source in enumerate(["reasoning_gym", "mine"])
    ]


def test_structs_may_be_json_text_and_ground_truth_may_be_structured(tmp_path: Path) -> None:
    tests = {"inputs": ["1\n"], "outputs": ["2\n"]}
    rows = [row(reward_model=json.dumps({"ground_truth": tests}), extra_info='{"index": 4}')]
    prompt = read_prompts(write(tmp_path / "code.parquet", rows))[0]
    assert json.loads(prompt.ground_truth) == tests
    assert prompt.extra_info == {"index": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_source": None}, "data_source: is None; text is needed"),
        ({"prompt": []}, "prompt: is empty"),
        ({"prompt": "What is 1 + 2?"}, "prompt: is 'What is 1 \\+ 2\\?'; a struct, or JSON text"),
        ({"prompt": [{"content": "x"}]}, r"prompt\[0\].role: is None; text is needed"),
        (
            {"prompt": [{"role": "user", "content": None}]},
            r"prompt\[0\].content: is empty; write what the user asks, or remove the row",
        ),
        ({"prompt": [{"role": "user", "content": " \n"}]}, r"prompt\[0\].content: is empty"),
        ({"reward_model": None}, "reward_model: is None; a struct"),
        ({"reward_model": {"style": "rule"}}, "reward_model.ground_truth: is None; write"),
        ({"reward_model": {"ground_truth": 3}}, "reward_model.ground_truth: is 3; write"),
        ({"extra_info": "[1]"}, r"extra_info: is \[1\]; a struct"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.parquet", [row(**changes)])
    with pytest.raises(DataError, match=rf"bad\.parquet, row 0, {message}"):
        read_prompts(path)


@pytest.mark.parametrize(("further", "ending"), [(0, "needed"), (2, "(2 further malformed rows)")])
def test_one_line_names_the_first_malformed_row(tmp_path: Path, further: int, ending: str) -> None:
    rows = [row(), row(data_source=None), row(), *[row(reward_model={"style": "rule"})] * further]
    with pytest.raises(DataError) as caught:
        read_prompts(write(tmp_path / "bad.parquet", rows))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'bad.parquet'}, row 1, data_source: is None; text is")
    assert message.endswith(ending)
    assert "\n" not in message


def test_a_missing_or_foreign_or_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_prompts(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_prompts(tmp_path / "text.parquet")
    schema = pa.schema([("data_source", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="has no rows"):
        read_prompts(tmp_path / "empty.parquet")


def test_batches_are_drawn_by_seed_and_step(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path / "train.parquet", [row()] * 10))
    source = PromptSource(prompts, seed=1)
    epoch = [p.prompt_id for step in range(5) for p in source.batch(step, 2)]
    assert sorted(epoch) == [f"train/{i}" for i in range(10)]
    assert PromptSource(prompts, seed=1).batch(7, 2) == source.batch(7, 2)


def test_question_text_is_the_last_user_message() -> None:
    messages = ({"role": "user", "content": "a"}, {"role": "user", "content": "b"})
    assert question_text(Prompt(messages, "", "", "p")) == "b"
    with pytest.raises(ValueError, match="'p' has no user message"):
        question_text(Prompt(({"role": "system", "content": "a"},), "", "", "p"))
