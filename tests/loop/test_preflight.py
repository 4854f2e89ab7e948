"""Every wrong combination gets one line that names the field, the value and the mend."""

import dataclasses
import json
import os
import re
import subprocess
import sys
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

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def model_folder(path: Path, tokens: list[str]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(QWEN3))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def prompts(path: Path, questions: list[str], data_source: str = "reasoning_gym") -> Path:
    rows = [
        {
            "data_source": data_source,
            "prompt": [{"role": "user", "content": question}],
            "ability": "math",
            "reward_model": {"ground_truth": "4", "style": "rule"},
            "extra_info": {
                "index": i,
                "dataset": "chain_sum",
                "entry": json.dumps({"question": question, "answer": "4", "metadata": {}}),
            },
        }
        for i, question in enumerate(questions)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A configuration with nothing wrong in it but that no engine runs."""
    return {
        "run": {"directory": str(tmp_path / "run")},
        "student": {
            "model_path": str(model_folder(tmp_path / "student", ["a", "b"])),
            "precision": "fp32",
        },
        "data": {"train": str(prompts(tmp_path / "train.parquet", ["2+2?", "3+3?"]))},
        "algorithm": {"prompts_per_step": 2, "prompts_per_mini_batch": 1},
        "evaluation": {"data": str(prompts(tmp_path / "eval.parquet", ["4+4?"]))},
        "serving": {
            "student": {"model_path": str(tmp_path / "student")},
            "teacher": {"model_path": str(model_folder(tmp_path / "teacher", ["a", "b"]))},
        },
    }


def problem(tree: dict[str, Any], **changes: Any) -> str:
    """What is wrong with ``tree`` after changes like ``run__steps=3``."""
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
    with pytest.raises(ConfigError) as found:
        check_before_launch(TypeAdapter(SodConfig).validate_python(tree))
    assert "\n" not in str(found.value)
    return str(found.value)


def test_all_is_well_but_for_the_engines(tree: dict[str, Any]) -> None:
    assert "python -m sod_mcore.serving" in problem(tree)


def test_mini_batches_that_do_not_divide(tree: dict[str, Any]) -> None:
    found = problem(tree, algorithm__prompts_per_step=3, algorithm__prompts_per_mini_batch=2)
    assert "algorithm.prompts_per_mini_batch is 2" in found


def test_a_rule_of_step_weights_that_does_not_exist(tree: dict[str, Any]) -> None:
    found = problem(tree, algorithm__weighting="sodd")
    assert "algorithm.weighting is 'sodd'; it must be one of sod, uniform" in found


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ({"distillation": "topk_loss"}, "algorithm.distillation is topk_loss, but"),
        ({"distillation": "none", "topk": {"k": 4}}, "algorithm.topk.k is 4, but"),
    ],
)
def test_candidates_and_their_loss_go_together(
    tree: dict[str, Any], algorithm: dict[str, Any], expected: str
) -> None:
    assert expected in problem(tree, algorithm={**tree["algorithm"], **algorithm})


def test_an_implementation_that_does_not_exist(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOD_OPS", "bogus")
    assert "SOD_OPS=bogus must be one of auto, eager, fused" in problem(tree)


def test_a_source_without_a_verifier(tree: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    prompts(other, ["5+5?", "6+6?"], data_source="gsm8k")
    assert "data_source = 'gsm8k'" in problem(tree, data__train=str(other))


def test_a_nucleus_that_the_logprobs_do_not_know(tree: dict[str, Any]) -> None:
    tree["rollout"] = {"top_p": 0.9}
    assert "rollout.top_p is 0.9" in problem(tree, algorithm__old_logprobs="rollout")


def test_old_tokens_need_a_correction(tree: dict[str, Any]) -> None:
    tree["rollout"] = {"max_staleness": 1}
    assert "set algorithm.tis_cap (2.0 is usual)" in problem(tree)
    tree["algorithm"] |= {"old_logprobs": "rollout"}
    assert "max_staleness" not in problem(tree)
    tree["algorithm"] |= {"old_logprobs": "recompute", "tis_cap": 2.0}
    assert "max_staleness" not in problem(tree)


def test_a_teacher_that_would_change_while_it_scores_ahead(tree: dict[str, Any]) -> None:
    tree["rollout"] = {"max_staleness": 1}
    tree["algorithm"] |= {"tis_cap": 2.0}
    tree["teacher"] = {"weights": "average"}
    message = problem(tree)
    assert "teacher.weights is average" in message
    assert "set teacher.weights=served, or rollout.max_staleness=0" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rollout": {"max_staleness": 1}}, "rollout.max_staleness is 1: engines cannot sample"),
        ({"serving__student__max_total_tokens": None}, "serving.student.max_total_tokens is null"),
        (
            {"serving__teacher__addresses": ["http://a:1"]},
            "serving.teacher.addresses is ['http://a:1']: only engines that this fleet starts",
        ),
        ({"serving__engines_on": "ray"}, "serving.engines_on is ray, which reserves GPUs"),
        (
            {"serving__weight_sync": "distributed", "serving__device": "cuda"},
            "serving.weight_sync is distributed: NCCL takes no two ranks on one GPU",
        ),
    ],
)
def test_engines_that_cannot_sleep(
    tree: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    tree["algorithm"] |= {"tis_cap": 2.0}
    tree["serving"]["placement"] = "colocated"
    for name in ("student", "teacher"):
        tree["serving"][name]["max_total_tokens"] = 1000
    assert "python -m sod_mcore.serving" in problem(tree), "all is well but for the engines"
    found = problem(tree, **changes)
    assert found.startswith(f"serving.placement is colocated, but {expected}")
    assert "serving.placement=split" in found or "give a number of tokens" in found
    tree["serving"]["placement"] = "split"
    assert "python -m sod_mcore.serving" in problem(tree)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ({"old_logprobs": "rollout"}, "but algorithm.old_logprobs is rollout"),
        (
            {"grpo_coefficient": 0.0, "distillation": "topk_loss", "topk": {"k": 4}},
            "with grpo_coefficient=0 and distillation=topk_loss there are none",
        ),
    ],
)
def test_importance_weights_that_weigh_nothing(
    tree: dict[str, Any], algorithm: dict[str, Any], expected: str
) -> None:
    tree["algorithm"] |= {"tis_cap": 2.0, **algorithm}
    found = problem(tree)
    assert found.startswith("algorithm.tis_cap is 2, but ")
    assert expected in found


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({"engines": 2, "gpus": [3, 4, 5]}, "serving.student.gpus is [3, 4, 5], which 2 engines"),
        (
            {"gpus": [3], "addresses": ["http://a:1"]},
            "serving.student.gpus is [3], but serving.student.addresses names engines",
        ),
        ({"ray_gpus": 2}, "serving.student.ray_gpus is 2, but serving.engines_on is local"),
    ],
)
def test_gpus_that_engines_cannot_have(
    tree: dict[str, Any], engine: dict[str, Any], expected: str
) -> None:
    """Said by the run as by the fleet, so that a check without engines finds it."""
    tree["serving"]["student"] |= engine
    assert problem(tree).startswith(expected)


@pytest.mark.parametrize("address", ["10.0.0.5:30000", "http://10.0.0.5", "engine", "http://a:b"])
def test_addresses_that_are_none(tree: dict[str, Any], address: str) -> None:
    tree["serving"]["student"]["addresses"] = [address]
    expected = f"{address!r} is no address of an engine; write http://host:port"
    with pytest.raises(ValueError, match=re.escape(expected)):
        problem(tree)


def test_a_broadcast_to_engines_on_a_cpu(tree: dict[str, Any]) -> None:
    tree["serving"] |= {"placement": "colocated", "weight_sync": "distributed", "device": "cpu"}
    for name in ("student", "teacher"):
        tree["serving"][name]["max_total_tokens"] = 1000
    assert "python -m sod_mcore.serving" in problem(tree)


def test_a_temperature_that_the_teacher_cannot_score(tree: dict[str, Any]) -> None:
    assert "rollout.temperature is 0.7" in problem(tree, rollout={"temperature": 0.7})


def test_a_penalty_for_length_that_begins_before_the_response(tree: dict[str, Any]) -> None:
    tree["rollout"] = {"max_response_tokens": 100}
    assert "reward.overlong_buffer is 101" in problem(tree, reward={"overlong_buffer": 101})


def test_no_engines_and_no_replay(tree: dict[str, Any]) -> None:
    assert "serving is missing" in problem(tree, serving=None)


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ({"weights": "live"}, "teacher.weights is live, but teacher.privileged is none"),
        (
            {"weights": "live", "privileged": "hint", "by_source": {"a": "teacher"}},
            "teacher.by_source is {'a': 'teacher'}, but teacher.weights is live",
        ),
        (
            {"by_source": {"math": "coder"}},
            "teacher.by_source.math is 'coder', which is no teacher",
        ),
        ({"by_source": {"math": "student"}}, "teacher.by_source.math is 'student'"),
        ({"weights": "average"}, "serving.teacher.model_path is"),
        (
            {"weights": "average", "by_source": {"a": "teacher"}},
            "teacher.weights is average: that is one teacher",
        ),
        (
            {"privileged_text": "x"},
            "teacher.privileged_text is 'x', but teacher.privileged is none",
        ),
        (
            {"privileged": "hint", "privileged_text": "{ground_truth}"},
            "teacher.privileged_text is '{ground_truth}'; it must hold {hint}",
        ),
        ({"privileged": "hint"}, "train/0: extra_info.hint is None"),
        ({"by_source": {"math_": "teacher"}}, "teacher.by_source.math_: no training prompt has"),
        (
            {"weights": "live", "privileged": "ground_truth"},
            "teacher.weights is live, but serving.teacher is configured, whose",
        ),
    ],
)
def test_teachers_that_cannot_teach(
    tree: dict[str, Any], teacher: dict[str, Any], expected: str
) -> None:
    assert expected in problem(tree, teacher=teacher)


@pytest.mark.parametrize("teacher", [{"weights": "average"}, {"privileged": "ground_truth"}])
def test_a_teacher_whom_nobody_asks(tree: dict[str, Any], teacher: dict[str, Any]) -> None:
    tree["algorithm"]["distillation"] = "none"
    assert "so no teacher is asked" in problem(tree, teacher=teacher)


def test_engines_that_nobody_asks(tree: dict[str, Any]) -> None:
    serving = {**tree["serving"], "teachers": {"coder": tree["serving"]["teacher"]}}
    assert "serving.teachers.coder is served, but" in problem(tree, serving=serving)


@pytest.mark.parametrize(("version", "is_refused"), [(0, False), (37, True)])
def test_a_teacher_that_holds_the_average_of_another_run(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, version: int, is_refused: bool
) -> None:
    tree["serving"]["teacher"]["model_path"] = tree["student"]["model_path"]
    tree["teacher"] = {"privileged": "ground_truth"}
    config = TypeAdapter(SodConfig).validate_python(tree)
    path = str(tree["student"]["model_path"])
    models = {
        name: ModelEndpoints(name, "", (), path, 30000, 300) for name in ("student", "teacher")
    }
    endpoints = Endpoints("", models, 1, 1, "")
    monkeypatch.setattr(preflight, "live_endpoints", lambda config: endpoints)
    monkeypatch.setattr(preflight, "weight_versions", lambda *arguments: (0, version))
    asked = read_run_prompts(config)
    if not is_refused:
        assert preflight.check_engines(config, asked) == endpoints
        return
    with pytest.raises(ConfigError, match="the engines of teacher hold weight version 37, an aver"):
        preflight.check_engines(config, asked)


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


def test_a_further_teacher_has_the_same_tokenizer(tree: dict[str, Any], tmp_path: Path) -> None:
    other = {"model_path": str(model_folder(tmp_path / "coder", ["a", "c"]))}
    found = problem(
        tree,
        serving={**tree["serving"], "teachers": {"coder": other}},
        teacher={"by_source": {"reasoning": "coder"}},
    )
    assert "serving.teachers.coder.model_path is" in found
    assert "tokenizer differs" in found


def test_packages_that_are_not_there(tree: dict[str, Any]) -> None:
    found = problem(tree, tools={"packages": ["no/such/folder"]})
    assert "tools.packages has 'no/such/folder', which is no folder here" in found


def test_a_tool_that_does_not_exist(tree: dict[str, Any]) -> None:
    assert "tools.names has 'abacus'; it must be one of" in problem(
        tree, tools={"names": ["abacus"]}
    )


def test_distillation_without_a_teacher(tree: dict[str, Any]) -> None:
    assert "serving.teacher is missing" in problem(tree, serving__teacher=None)


def test_a_missing_student(tree: dict[str, Any]) -> None:
    assert "student.model_path" in problem(tree, student__model_path="nowhere")


def test_a_missing_prompt_file(tree: dict[str, Any]) -> None:
    assert "data.train is nowhere.parquet" in problem(tree, data__train="nowhere.parquet")


def test_a_teacher_with_another_tokenizer(tree: dict[str, Any], tmp_path: Path) -> None:
    other = model_folder(tmp_path / "other", ["b", "a"])
    found = problem(tree, serving__teacher__model_path=str(other))
    assert "its tokenizer differs" in found


def test_an_evaluation_problem_in_the_training_set(tree: dict[str, Any], tmp_path: Path) -> None:
    shared = prompts(tmp_path / "shared.parquet", ["  2+2"])
    assert "1 of 1 evaluation questions" in problem(tree, evaluation__data=str(shared))


def test_more_prompts_a_step_than_there_are(tree: dict[str, Any]) -> None:
    assert "has only 2 prompts" in problem(tree, algorithm__prompts_per_step=4)


def test_heads_that_the_ranks_cannot_share(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = problem(tree, student__megatron={"tensor_model_parallel_size": 3})
    assert "tensor_model_parallel_size" in found


def test_a_recording_that_does_not_exist(tree: dict[str, Any]) -> None:
    assert "run.replay is nowhere" in problem(tree, run__replay="nowhere")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.stepz=3", "run.stepz is not a setting; allowed here: "),
        ("student.megatron.tensor_model_parallel_sise=2", "tensor_model_parallel_sise"),
    ],
)
def test_the_program_ends_with_one_line_and_exit_code_2(
    tree: dict[str, Any], tmp_path: Path, override: str, expected: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(tree))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "pretrain_sod.py", str(config), override],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]


def test_the_base_configuration_is_immutable(tree: dict[str, Any]) -> None:
    config = TypeAdapter(SodConfig).validate_python(tree)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.steps = 3  # type: ignore[misc]
