"""Settings of the engines, and engines that other settings have started."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from sod_mcore.config import ConfigError, SodConfig
from sod_mcore.loop import preflight
from sod_mcore.loop.run_prompts import read_run_prompts
from sod_mcore.serving.endpoints import Endpoints, ModelEndpoints
from tests.loop.preflight.wrong_settings import model_folder, problem


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


def test_a_broadcast_to_engines_on_a_cpu(tree: dict[str, Any]) -> None:
    tree["serving"] |= {"placement": "colocated", "weight_sync": "distributed", "device": "cpu"}
    for name in ("student", "teacher"):
        tree["serving"][name]["max_total_tokens"] = 1000
    assert "python -m sod_mcore.serving" in problem(tree)


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


def test_memory_that_engines_cannot_read(tree: dict[str, Any]) -> None:
    tree["serving"] |= {"weight_sync": "cuda_ipc", "device": "cpu"}
    assert problem(tree).startswith("serving.weight_sync is cuda_ipc, but the engines run on CPUs")


def test_engines_that_cannot_read_the_trainers_memory(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree["serving"] |= {"weight_sync": "cuda_ipc", "device": "cuda"}
    config = TypeAdapter(SodConfig).validate_python(tree)
    assert config.serving is not None
    models = {
        name: ModelEndpoints(name, "", (), engine.model_path, 30000, 300)
        for name, engine in config.serving.models.items()
    }
    elsewhere = Endpoints("", models, 1, 1, "node7")
    monkeypatch.setattr(preflight, "live_endpoints", lambda config: elsewhere)
    monkeypatch.setattr(preflight, "weight_versions", lambda *arguments: (0,))
    monkeypatch.setattr(preflight, "engine_shapes", lambda endpoints: {})
    with pytest.raises(ConfigError, match="weight_sync is cuda_ipc, but the engines run on node7"):
        preflight.check_engines(config, read_run_prompts(config))


@pytest.mark.parametrize("address", ["10.0.0.5:30000", "http://10.0.0.5", "engine", "http://a:b"])
def test_addresses_that_are_none(tree: dict[str, Any], address: str) -> None:
    tree["serving"]["student"]["addresses"] = [address]
    expected = f"{address!r} is no address of an engine; write http://host:port"
    with pytest.raises(ValueError, match=re.escape(expected)):
        problem(tree)


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


def test_a_teacher_with_another_tokenizer(tree: dict[str, Any], tmp_path: Path) -> None:
    other = model_folder(tmp_path / "other", ["b", "a"])
    found = problem(tree, serving__teacher__model_path=str(other))
    assert "its tokenizer differs" in found


def test_a_further_teacher_has_the_same_tokenizer(tree: dict[str, Any], tmp_path: Path) -> None:
    other = {"model_path": str(model_folder(tmp_path / "coder", ["a", "c"]))}
    found = problem(
        tree,
        serving={**tree["serving"], "teachers": {"coder": other}},
        teacher={"by_source": {"reasoning": "coder"}},
    )
    assert "serving.teachers.coder.model_path is" in found
    assert "tokenizer differs" in found


def test_distillation_without_a_teacher(tree: dict[str, Any]) -> None:
    assert "serving.teacher is missing" in problem(tree, serving__teacher=None)


def test_no_engines_and_no_replay(tree: dict[str, Any]) -> None:
    assert "serving is missing" in problem(tree, serving=None)
