"""Wrong settings of an evaluation are one line, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sod_mcore.config import BenchmarkConfig, ConfigError, EvalConfig
from sod_mcore.data import DataError
from sod_mcore.evaluation.__main__ import main, read_config
from sod_mcore.evaluation.benchmark import evaluate_benchmarks
from sod_mcore.evaluation.data_sets import read_data_sets
from sod_mcore.evaluation.preflight import sample_settings
from tests.end_to_end.programs import TEACHER


def rows(path: Path, sources: tuple[str, ...] = ("math_dapo", "math_dapo")) -> Path:
    """A JSONL file of problems in the schema of reinforcement learning."""
    lines = [
        json.dumps(
            {
                "data_source": source,
                "prompt": [{"role": "user", "content": f"What is {number} + 1?"}],
                "reward_model": {"ground_truth": str(number + 1), "style": "rule"},
                "extra_info": {"index": number},
            }
        )
        for number, source in enumerate(sources)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A command line on which nothing is wrong."""
    options = {"--model": TEACHER, "--data": rows(tmp_path / "sums.jsonl"), "--output": tmp_path}
    words = [word for name, value in options.items() for word in (name, str(value))]
    return [
        *words,
        "serving.student.context_length=4096",
        "rollout.max_response_tokens=256",
        "evaluation.max_prompt_tokens=1024",
    ]


def problem(arguments: list[str], *overrides: str) -> str:
    def never(line: str) -> None:
        raise AssertionError(f"something started: {line}")

    with pytest.raises((ConfigError, DataError)) as caught:
        evaluate_benchmarks(read_config([*arguments, *overrides]), never)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    config = read_config(["--model", "m", "--data", "a.parquet", "--output", str(tmp_path)])
    benchmark = config.evaluation
    assert (benchmark.samples, benchmark.temperature, benchmark.top_p) == (32, 1.0, 0.6)
    assert (config.rollout.max_turns, config.rollout.max_response_tokens) == (16, 20480)
    assert benchmark.max_prompt_tokens == 4096
    assert benchmark.data_files == ("a.parquet",)
    assert config.serving.student.model_path == "m"


def test_the_file_of_the_paper_changes_no_default(tmp_path: Path) -> None:
    words = ["evaluation.data=a", "evaluation.output=b", "serving.student.model_path=m"]
    (tmp_path / "own.yaml").write_text("{}")
    assert read_config(words) == read_config([str(tmp_path / "own.yaml"), *words])


def test_data_may_be_repeated() -> None:
    words = ["--model", "m", "--data", "a", "--data", "b", "--output", "o"]
    assert read_config(words).evaluation.data_files == ("a", "b")


def test_two_files_of_settings(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="2 files of settings"):
        read_config([*arguments, "a.yaml", "b.yaml"])


def test_something_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "m", "--output", "o"])
    assert "evaluation.data is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["evaluation.temperature=0"], "evaluation.samples is 32 at evaluation.temperature=0"),
        (
            ["evaluation.temperature=0", "evaluation.samples=1", "evaluation.seeds=[1,2]"],
            "evaluation.seeds is [1, 2] at evaluation.temperature=0",
        ),
        (
            ["evaluation.show_tests=true", "evaluation.instructions=none"],
            "evaluation.show_tests is true, but evaluation.instructions is none",
        ),
        (["evaluation.seeds=[1,1]"], "evaluation.seeds is [1, 1]"),
        (["evaluation.seeds=[]"], "evaluation.seeds is []"),
        (["rollout.top_p=0.9"], "rollout.top_p is 0.9, which is training's"),
        (
            ["rollout.pool=ray", "serving.engines_on=ray"],
            "rollout.ray_address is None, but serving.ray_address is auto",
        ),
        (["serving.student.model_path=/nowhere"], "/nowhere: it has no config.json"),
        (["serving.student.context_length=64"], "an engine of 64 tokens takes 57"),
        (["evaluation.max_prompt_tokens=3"], "evaluation.max_prompt_tokens is 3; sums/0 has"),
        (["evaluation.data=[]"], "evaluation.data is empty"),
        (["evaluation.data=/nowhere.parquet"], "/nowhere.parquet"),
        (["tools.names=[telescope]"], "tools.names has 'telescope'"),
    ],
)
def test_wrong_settings(arguments: list[str], overrides: list[str], words: str) -> None:
    assert words in problem(arguments, *overrides)


def test_the_first_problems_of_each_file(tmp_path: Path) -> None:
    files = tuple(str(rows(tmp_path / f"{name}.jsonl")) for name in ("a", "b"))
    read = read_data_sets(BenchmarkConfig(data=files, output="o", max_prompts=1))
    ids = [[prompt.prompt_id for prompt in data_set.prompts] for data_set in read]
    assert ids == [["a/0"], ["b/0"]]
    assert len(read_data_sets(BenchmarkConfig(data=files, output="o"))[0].prompts) > 1


def test_a_source_without_verifier(arguments: list[str], tmp_path: Path) -> None:
    file = rows(tmp_path / "mixed.jsonl", sources=("math_dapo", "riddles"))
    assert "'riddles'" in problem(arguments, f"evaluation.data={file}")


def test_two_files_of_one_name(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = rows(tmp_path / "other" / "sums.jsonl")
    files = json.dumps([str(tmp_path / "sums.jsonl"), str(other)])
    assert "2 files named 'sums'" in problem(arguments, f"evaluation.data={files}")


def test_what_changes_no_sample_may_change(arguments: list[str]) -> None:
    plain = settings(arguments)
    same = [
        "rollout.concurrency=3",
        "tools.workers=1",
        "reward.workers=1",
        "evaluation.samples=2",
        "evaluation.seeds=[1,2]",
        "evaluation.max_prompts=1",
    ]
    assert settings(arguments, *same) == plain


@pytest.mark.parametrize(
    "override",
    [
        "evaluation.top_p=1.0",
        "rollout.max_turns=2",
        "reward.math=minerva",
        "tools.names=[]",
        "chat.enable_thinking=false",
        "evaluation.instructions=none",
    ],
)
def test_what_changes_samples_is_told_apart(arguments: list[str], override: str) -> None:
    assert settings(arguments, override) != settings(arguments)


def test_other_weights_are_told_apart(arguments: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in TEACHER.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    override = f"serving.student.model_path={folder}"
    before = settings(arguments, override)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert settings(arguments, override) != before


def settings(arguments: list[str], *overrides: str) -> dict[str, Any]:
    config: EvalConfig = read_config([*arguments, *overrides])
    return sample_settings(config, read_data_sets(config.evaluation))
