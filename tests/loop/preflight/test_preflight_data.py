"""Prompts: their files, their lengths, and who judges and teaches them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from sod_mcore.chat import ChatRenderer
from sod_mcore.config import ConfigError, SodConfig
from sod_mcore.loop import preflight
from sod_mcore.loop.preflight import check_before_launch
from sod_mcore.loop.run_prompts import first_of_each_file, read_run_prompts
from sod_mcore.loop.teacher_checks import check_teacher_lengths
from sod_mcore.rollout.teacher import teacher_messages
from sod_mcore.serving.endpoints import RESERVED_TOKENS, Endpoints, ModelEndpoints
from sod_mcore.tools import code_interpreter_schema
from sod_mcore.trajectory import Prompt
from tests.end_to_end.programs import REPOSITORY
from tests.loop.preflight.wrong_settings import problem, prompts


def test_a_source_without_a_verifier(tree: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    prompts(other, ["5+5?", "6+6?"], data_source="gsm8k")
    assert "data_source = 'gsm8k'" in problem(tree, data__train=str(other))


@pytest.fixture
def engines_run(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Engines that are said to run, and a real tokenizer; the lengths of the training prompts."""
    folder = str(REPOSITORY / "examples" / "arithmetic" / "teacher")
    tree["student"]["model_path"] = folder
    for name in ("student", "teacher"):
        tree["serving"][name]["model_path"] = folder
    endpoints = Endpoints("", {}, 1, 1, "")
    monkeypatch.setattr(preflight, "check_engines", lambda config, prompts: endpoints)
    renderer = ChatRenderer.from_folder(folder)
    schema = [code_interpreter_schema()]
    longer = prompts(Path(tree["data"]["train"]), ["2+2?", "3+3?", "2+2 and then + 3?"])
    asked = read_run_prompts(TypeAdapter(SodConfig).validate_python(tree)).train
    assert longer.is_file()
    return [len(renderer.render_prompt(prompt.messages, schema)) for prompt in asked]


def test_prompts_that_are_too_long(tree: dict[str, Any], engines_run: list[int]) -> None:
    short, _, long = engines_run
    assert short < long
    limit = {"data__max_prompt_tokens": long - 1}
    expected = f"data.max_prompt_tokens is {long - 1}; train/2 has {long} tokens with the tool"
    assert expected in problem(tree, **limit)
    tree["data"]["overlong_prompts"] = "drop"
    kept = check_before_launch(TypeAdapter(SodConfig).validate_python(tree))
    assert [prompt.prompt_id for prompt in kept.train] == ["train/0", "train/1"]
    assert "has only 0 prompts" in problem(tree, data__max_prompt_tokens=short - 1, evaluation={})


def test_evaluation_prompts_are_never_left_out(
    tree: dict[str, Any], engines_run: list[int], tmp_path: Path
) -> None:
    long = prompts(tmp_path / "long.parquet", ["1+1 and then + 2 and then + 3?"])
    tree["data"] |= {"max_prompt_tokens": max(engines_run), "overlong_prompts": "drop"}
    assert "long/0 has" in problem(tree, evaluation__data=str(long))


def test_more_than_the_teachers_engine_takes(tree: dict[str, Any], tmp_path: Path) -> None:
    """The prompt that the teacher is told more in, measured with a real tokenizer."""
    folder = REPOSITORY / "examples" / "arithmetic" / "teacher"
    config = TypeAdapter(SodConfig).validate_python(
        {
            **tree,
            "teacher": {"privileged": "ground_truth", "privileged_text": " = {ground_truth}"},
            "rollout": {"max_response_tokens": 100},
        }
    )
    asked = read_run_prompts(config).train
    renderer = ChatRenderer.from_folder(folder)
    longest = max(
        len(renderer.render_prompt(teacher_messages(config.teacher, p), [])) for p in asked
    )

    def check(context_length: int) -> None:
        model = ModelEndpoints("teacher", "", (), "", context_length, 300)
        endpoints = Endpoints("", {"teacher": model}, 1, 1, "")
        check_teacher_lengths(config, endpoints, renderer, [], asked)

    check(longest + 100 + RESERVED_TOKENS)
    with pytest.raises(ConfigError, match=f"train/0 has {longest} tokens.*privileged_max_char"):
        check(longest + 100 + RESERVED_TOKENS - 1)


def test_the_first_prompts_of_each_file() -> None:
    names = ["a/0", "a/1", "a/2", "b/0", "b/1"]
    asked = [Prompt((), "", "", name) for name in names]
    assert [p.prompt_id for p in first_of_each_file(asked, 2)] == ["a/0", "a/1", "b/0", "b/1"]
    assert first_of_each_file(asked, None) == asked


def test_a_source_without_a_teacher(tree: dict[str, Any], tmp_path: Path) -> None:
    both = tmp_path / "both.parquet"
    files = [
        prompts(tmp_path / "code.parquet", ["5+5?"], data_source="reasoning_gym_code"),
        prompts(tmp_path / "sums.parquet", ["6+6?"]),
    ]
    pq.write_table(pa.concat_tables(map(pq.read_table, files)), both)
    teachers = {"coder": tree["serving"]["teacher"]}
    found = problem(
        tree,
        data__train=str(both),
        serving={**tree["serving"], "teachers": teachers, "teacher": None},
        teacher={"by_source": {"reasoning_gym_code": "coder"}},
    )
    assert "data_source 'reasoning_gym' of both/1 has no teacher" in found


def test_a_missing_prompt_file(tree: dict[str, Any]) -> None:
    assert "data.train is nowhere.parquet" in problem(tree, data__train="nowhere.parquet")


def test_an_evaluation_problem_in_the_training_set(tree: dict[str, Any], tmp_path: Path) -> None:
    shared = prompts(tmp_path / "shared.parquet", ["  2+2"])
    assert "1 of 1 evaluation questions" in problem(tree, evaluation__data=str(shared))


def test_more_prompts_a_step_than_there_are(tree: dict[str, Any]) -> None:
    assert "has only 2 prompts" in problem(tree, algorithm__prompts_per_step=4)
