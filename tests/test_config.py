"""Settings: defaults, overrides, and one clear line for each way to get them wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from sod_mcore.config import ConfigError, SftConfig, SodConfig
from sod_mcore.config_file import fail, load_config

MINIMAL = """
run: {directory: runs/a}
student: {model_path: models/student, megatron: {tensor_model_parallel_size: 2}}
data: {train: data/train.parquet}
"""


def write(tmp_path: Path, text: str = MINIMAL) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def load_error(tmp_path: Path, *overrides: str, text: str = MINIMAL) -> str:
    """The one line that refuses the configuration."""
    with pytest.raises(ConfigError) as refusal:
        load_config(SodConfig, write(tmp_path, text), overrides)
    message = str(refusal.value)
    assert "\n" not in message
    return message


def test_a_minimal_file_gets_the_papers_constants(tmp_path: Path) -> None:
    config = load_config(SodConfig, write(tmp_path))
    assert config.run.directory == "runs/a"
    assert config.student.megatron == {"tensor_model_parallel_size": 2}
    assert config.serving is None
    algorithm = config.algorithm
    assert (algorithm.weight_epsilon, algorithm.weight_delta) == (1e-6, 0.2)
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip) == (0.2, 0.28, 3.0)


@pytest.mark.parametrize(
    ("override", "section", "name", "expected"),
    [
        ("optimizer.lr=1e-4", "optimizer", "lr", 1e-4),
        ("optimizer.adam_betas=[0.9, 0.95]", "optimizer", "adam_betas", (0.9, 0.95)),
        ("run.record=null", "run", "record", None),
        ("run.stop_file=a=b", "run", "stop_file", "a=b"),
        ("rollout.top_p=0.5", "rollout", "top_p", 0.5),
        ("tools.enabled=false", "tools", "enabled", False),
        ("student.megatron.pipeline_model_parallel_size=2", "student", "megatron",
         {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    ],
)  # fmt: skip
def test_overrides_are_yaml(
    tmp_path: Path, override: str, section: str, name: str, expected: object
) -> None:
    config = load_config(SodConfig, write(tmp_path), [override])
    assert getattr(getattr(config, section), name) == expected


def test_later_overrides_win_and_the_file_is_below_them(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "algorithm: {group_size: 4, epochs: 2}\n")
    config = load_config(SodConfig, path, ["algorithm.group_size=8", "algorithm.group_size=6"])
    assert (config.algorithm.group_size, config.algorithm.epochs) == (6, 2)


def test_an_override_can_open_a_section(tmp_path: Path) -> None:
    config = load_config(SodConfig, write(tmp_path), ["serving.student.model_path=models/student"])
    assert config.serving is not None
    assert config.serving.student.model_path == "models/student"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config(SodConfig, tmp_path / "nowhere.yaml")


def test_unknown_keys_are_refused_with_the_allowed_ones(tmp_path: Path) -> None:
    message = load_error(tmp_path, "optimizer.learning_rate=1")
    assert message.startswith("optimizer.learning_rate is not a setting; allowed here: ")
    assert "lr" in message.split("allowed here: ")[1].split(", ")


def test_unknown_keys_are_refused_in_nested_and_optional_sections(tmp_path: Path) -> None:
    assert "algorithm.topk.K is not a setting; allowed here: coefficient" in load_error(
        tmp_path, "algorithm.topk.K=4"
    )
    message = load_error(
        tmp_path, "serving.student.model_path=a", "serving.teacher={model_path: b, favourite: 1}"
    )
    assert message.startswith("serving.teacher.favourite is not a setting; allowed here: addresses")


def test_unknown_sections_are_refused(tmp_path: Path) -> None:
    message = load_error(tmp_path, "trainer.steps=3")
    assert message.startswith("trainer is not a setting; allowed here: algorithm, chat, data")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("run.steps=0", ["run.steps is 0", "greater than 0"]),
        ("run.steps=many", ["run.steps is 'many'", "integer"]),
        ("optimizer.schedule=step", ["optimizer.schedule is 'step'", "'constant'", "'cosine'"]),
        ("rollout.max_dropped_fraction=1.5", ["rollout.max_dropped_fraction is 1.5", "1"]),
        ("algorithm.topk.jsd_beta=1", ["algorithm.topk.jsd_beta is 1", "less than 1"]),
        ("algorithm.distillation=k4", ["algorithm.distillation is 'k4'", "'topk_loss'"]),
        (
            "algorithm.distillation=k1_loss",
            ["algorithm.distillation is 'k1_loss': its gradient does not", "take advantage"],
        ),
        (
            "algorithm.distillation=topk_advantage",
            ["algorithm.distillation is 'topk_advantage': its expected gradient is zero"],
        ),
        (
            "algorithm.distillation=topk_without_tail",
            ["algorithm.distillation is 'topk_without_tail': what the student puts outside"],
        ),
        ("optimizer.adam_betas=[0.9]", ["optimizer.adam_betas"]),
        ("student=null", ["student is None"]),
    ],
)
def test_bad_values_name_the_setting_the_value_and_what_is_allowed(
    tmp_path: Path, override: str, parts: list[str]
) -> None:
    message = load_error(tmp_path, override)
    for part in parts:
        assert part in message


def test_a_missing_setting_is_named_with_the_mend(tmp_path: Path) -> None:
    message = load_error(tmp_path, text="run: {directory: a}\nstudent: {model_path: b}\n")
    assert message == "data is missing; set it in the file or as data=VALUE"
    message = load_error(tmp_path, text=MINIMAL.replace("train: data/train.parquet", ""))
    assert message == "data.train is missing; set it in the file or as data.train=VALUE"


@pytest.mark.parametrize("override", ["run.steps", "=3"])
def test_an_override_without_key_or_value_is_refused(tmp_path: Path, override: str) -> None:
    assert load_error(tmp_path, override) == f"override {override!r} must look like key.sub=value"


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    message = load_error(tmp_path, "run.directory.name=x")
    assert message == "override 'run.directory.name=x': 'directory' is a value, not a section"


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text\n"])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "must hold a mapping of sections" in load_error(tmp_path, text=text)


def test_sections_cannot_be_changed_after_loading(tmp_path: Path) -> None:
    config = load_config(SodConfig, write(tmp_path))
    with pytest.raises(AttributeError):
        config.run.steps = 3  # type: ignore[misc]


def test_the_teacher_is_needed_exactly_if_a_term_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert load_config(SodConfig, path).needs_teacher
    assert not load_config(SodConfig, path, ["algorithm.distillation=none"]).needs_teacher
    with_topk = ["algorithm.distillation=topk_loss", "algorithm.topk.k=4"]
    assert load_config(SodConfig, path, with_topk).needs_teacher


def test_the_sft_tree_loads_by_the_same_rules(tmp_path: Path) -> None:
    text = """
sft: {directory: runs/sft, export: models/out, updates: 10}
student: {model_path: models/init}
data: {train: data/sft.parquet}
"""
    config = load_config(SftConfig, write(tmp_path, text), ["sft.max_seconds=60"])
    assert (config.sft.batch_size, config.sft.max_seconds) == (128, 60.0)
    with pytest.raises(ConfigError, match="run is not a setting"):
        load_config(SftConfig, write(tmp_path, text), ["run.steps=1"])


def test_fail_prints_one_line_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        fail("run.steps is 0")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: run.steps is 0\n"


@pytest.mark.parametrize("text", ["run: [", "run: {directory: 'a\n", "\tx: 1\n"])
def test_a_file_that_is_not_yaml_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    assert "is not YAML" in load_error(tmp_path, text=text)


def test_an_override_that_is_not_yaml_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "the value is not YAML" in load_error(tmp_path, "run.steps=[1")


def test_a_file_is_laid_over_those_that_it_extends(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "base.yaml").write_text(
        MINIMAL + "algorithm: {group_size: 2, clip_low: 0.1}\nevaluation: {temperatures: [1.0]}"
    )
    (tmp_path / "parts" / "method.yaml").write_text("algorithm: {weighting: uniform}")
    text = (
        "extends: [parts/base.yaml, parts/method.yaml]\n"
        "algorithm: {group_size: 4}\nevaluation: {temperatures: [0.0, 0.5]}"
    )
    config = load_config(SodConfig, write(tmp_path, text), ["algorithm.clip_low=0.3"])
    algorithm = config.algorithm
    assert (algorithm.weighting, algorithm.group_size) == ("uniform", 4)
    assert algorithm.clip_low == 0.3
    assert config.evaluation.temperatures == (0.0, 0.5)
    assert config.run.directory == "runs/a"


def test_a_chain_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(MINIMAL + "algorithm: {group_size: 2, epochs: 2}")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nalgorithm: {group_size: 3}")
    config = load_config(SodConfig, write(tmp_path, "extends: b.yaml"))
    assert (config.algorithm.group_size, config.algorithm.epochs) == (3, 2)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("extends: run.yaml", "run.yaml extends itself"),
        ("extends: nowhere.yaml", "nowhere.yaml, which"),
        ("extends: {a: b}", "extends is {'a': 'b'}; it must be the path of a YAML file"),
        ("extends: [3]", "extends is [3]; it must be"),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, text: str, problem: str) -> None:
    assert problem in load_error(tmp_path, text=text)


@pytest.mark.parametrize("name", ["student", "teacher", "a.b", "a-b"])
def test_names_that_further_teachers_cannot_have(tmp_path: Path, name: str) -> None:
    text = (
        MINIMAL
        + f"serving: {{student: {{model_path: a}}, teachers: {{{name}: {{model_path: b}}}}}}"
    )
    assert "cannot name a further teacher" in load_error(tmp_path, text=text)


def test_faults_inside_a_further_teacher_are_named_as_they_are_written(tmp_path: Path) -> None:
    teachers = ["serving.student.model_path=a", "serving.teachers.coder.model_path=b"]
    unknown = load_error(tmp_path, *teachers, "serving.teachers.coder.model_pat=c")
    assert unknown.startswith("serving.teachers.coder.model_pat is not a setting; allowed here: ")
    assert "context_length" in unknown
    assert load_error(tmp_path, "evaluation.data=[a, 3]").startswith("evaluation.data is [")
