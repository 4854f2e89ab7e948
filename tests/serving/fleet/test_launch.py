"""Which arguments and environment an engine gets."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from sod_mcore.config import ConfigError, EngineConfig, ServingConfig
from sod_mcore.serving.fleet import launch
from sod_mcore.serving.fleet.launch import Address, EnginePlace
from sod_mcore.serving.fleet.model_folder import ModelFolder, read_model_folder

HERE = Address("127.0.0.1", 1234)
SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1000,
    "dtype": "float32",
}


def folder(path: Path, **changes: Any) -> ModelFolder:
    (path / "config.json").write_text(json.dumps(SHAPE | changes))
    return read_model_folder("serving.student.model_path", path)


def command(path: Path, place: EnginePlace, **engine: Any) -> list[str]:
    config = EngineConfig(model_path=str(path), **engine)
    return launch.engine_command(
        ServingConfig(student=config), config, folder(path, dtype="bfloat16"), place, HERE
    )


def value(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


@pytest.mark.parametrize(
    ("device", "stored", "expected"),
    [
        ("cpu", "float32", "float32"),
        ("cpu", "bfloat16", "float32"),
        ("cuda", "bfloat16", "bfloat16"),
        ("cuda", "float16", "float16"),
        ("cuda", "float32", "bfloat16"),  # SGLang's own "auto" would take float16
    ],
)
def test_precision(tmp_path: Path, device: launch.Device, stored: str, expected: str) -> None:
    config = EngineConfig(model_path=str(tmp_path))
    place = EnginePlace("student", 0, device)
    model = folder(tmp_path, dtype=stored)
    arguments = launch.engine_command(ServingConfig(student=config), config, model, place, HERE)
    assert value(arguments, "--dtype") == expected


def test_a_tokenizer_is_loaded_where_there_is_one(tmp_path: Path) -> None:
    place = EnginePlace("student", 0, "cpu")
    assert "--skip-tokenizer-init" in command(tmp_path, place)
    (tmp_path / "tokenizer.json").touch()
    assert "--skip-tokenizer-init" not in command(tmp_path, place)


def test_extra_arguments_win(tmp_path: Path) -> None:
    place = EnginePlace("teacher", 0, "cpu")
    arguments = command(tmp_path, place, extra_args=("--log-level", "info"))
    assert arguments[-2:] == ["--log-level", "info"]
    assert value(arguments, "--served-model-name") == "teacher"


def test_gpus_are_shared_evenly(tmp_path: Path) -> None:
    engine = EngineConfig(model_path=str(tmp_path), engines=2, gpus=(2, 3, 6, 7))
    for index, expected in enumerate(["2,3", "6,7"]):
        place = EnginePlace("student", index, "cuda")
        environment = launch.engine_environment(ServingConfig(student=engine), engine, place)
        assert environment["CUDA_VISIBLE_DEVICES"] == expected
        arguments = command(tmp_path, place, engines=2, gpus=(2, 3, 6, 7))
        assert value(arguments, "--tp-size") == "2"
    with pytest.raises(ConfigError, match="3 engines cannot share evenly"):
        launch.engine_gpus(EngineConfig(model_path="", engines=3, gpus=(0, 1)), 0)


@pytest.mark.parametrize(
    ("name", "weight_sync", "gpus", "expected"),
    [
        ("student", "cuda_ipc", (2, 3), "2,3,0"),
        ("student", "cuda_ipc", (0, 1), "0,1"),
        ("student", "cuda_ipc", (), None),
        ("student", "disk", (2, 3), "2,3"),
        ("teacher", "cuda_ipc", (2,), "2,0"),
        ("coder", "cuda_ipc", (2,), "2"),
    ],
)
def test_engines_that_read_rank_zeros_gpu_see_it(
    tmp_path: Path, name: str, weight_sync: Any, gpus: tuple[int, ...], expected: str | None
) -> None:
    """After their own GPUs, of which SGLang takes as many as --tp-size says. A teacher may be an
    average; further ones never get weights."""
    engine, place = EngineConfig(model_path=str(tmp_path), gpus=gpus), EnginePlace(name, 0, "cuda")
    serving = ServingConfig(student=engine, weight_sync=weight_sync)
    environment = launch.engine_environment(serving, engine, place, {})
    assert environment.get("CUDA_VISIBLE_DEVICES") == expected
    arguments = command(tmp_path, place, gpus=gpus)
    assert value(arguments, "--tp-size") == str(len(gpus) or 1)


def test_the_share_of_a_gpus_memory(tmp_path: Path) -> None:
    on_a_gpu = command(tmp_path, EnginePlace("student", 0, "cuda"), memory_fraction=0.4)
    assert value(on_a_gpu, "--mem-fraction-static") == "0.4"
    without = command(tmp_path, EnginePlace("student", 0, "cpu"), memory_fraction=0.4)
    assert "--mem-fraction-static" not in without
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="memory_fraction"):
            EngineConfig(model_path="m", memory_fraction=share)


def test_the_bridge_is_on_the_path_only_without_a_gpu(tmp_path: Path) -> None:
    engine = EngineConfig(model_path=str(tmp_path), threads=3)
    serving = ServingConfig(student=engine)
    cpu = launch.engine_environment(serving, engine, EnginePlace("student", 0, "cpu"))
    assert cpu["PYTHONPATH"].startswith(str(launch.CPU_BRIDGE))
    assert cpu["OMP_NUM_THREADS"] == "3"
    cuda = launch.engine_environment(serving, engine, EnginePlace("student", 0, "cuda"))
    assert str(launch.CPU_BRIDGE) not in cuda.get("PYTHONPATH", "")


@pytest.mark.parametrize(
    ("name", "device", "placement", "expected"),
    [
        ("student", "cuda", "split", []),
        ("student", "cuda", "colocated", ["--enable-memory-saver"]),
        ("teacher", "cuda", "colocated", ["--enable-memory-saver", "--enable-weights-cpu-backup"]),
        ("coder", "cuda", "colocated", ["--enable-memory-saver", "--enable-weights-cpu-backup"]),
        ("teacher", "cpu", "colocated", []),
    ],
)
def test_engines_that_sleep(
    tmp_path: Path, name: str, device: launch.Device, placement: Any, expected: list[str]
) -> None:
    """The student's weights are sent anew, the others' are kept; a CPU engine needs no flag."""
    config = EngineConfig(model_path=str(tmp_path))
    serving = ServingConfig(student=config, placement=placement)
    place = EnginePlace(name, 0, device)
    address = launch.Address("127.0.0.1", 1)
    arguments = launch.engine_command(serving, config, folder(tmp_path), place, address)
    flags = [a for a in arguments if a.startswith("--enable")]
    assert flags == expected


def test_engines_that_sleep_have_no_expandable_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    engine, place = EngineConfig(model_path=str(tmp_path)), EnginePlace("student", 0, "cuda")
    for placement in ("split", "colocated"):
        serving = ServingConfig(student=engine, placement=placement)
        environment = launch.engine_environment(serving, engine, place)
        assert ("PYTORCH_CUDA_ALLOC_CONF" in environment) == (placement == "split")


@pytest.mark.parametrize(
    ("changes", "running", "expected"),
    [
        ({}, 8, 8000),  # all that eight sequences can use
        ({"num_hidden_layers": 300}, 128, 2**30 // (4 * 2 * 300 * 2 * 16)),  # what fits
        ({"num_hidden_layers": 30000}, 128, 1000),  # at least one sequence
    ],
)
def test_cache_without_a_gpu(
    tmp_path: Path, changes: dict[str, int], running: int, expected: int
) -> None:
    engine = EngineConfig(model_path=str(tmp_path))
    assert launch.default_cpu_tokens(engine, folder(tmp_path, **changes), running) == expected


def test_what_keeps_a_process_from_starting(tmp_path: Path) -> None:
    """A node may have no such folder for the log, which is not the interpreter's fault."""
    log_path = tmp_path / "serving" / "student_engine_0.log"
    for name in (log_path, log_path.parent):
        error = OSError(errno.EACCES, "Permission denied", str(name))
        said = launch.cannot_be_started("bin/python", log_path, error)
        assert said.startswith(f"{log_path} cannot be written on ")
        assert said.endswith(": Permission denied")
    error = OSError(errno.ENOENT, "No such file or directory", "bin/python")
    said = launch.cannot_be_started("bin/python", log_path, error)
    assert said.startswith("serving.python is 'bin/python', which cannot be started")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"serving\.teacher\.model_path .* has no config\.json"):
        read_model_folder("serving.teacher.model_path", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="lacks"):
        read_model_folder("serving.teacher.model_path", tmp_path)


def test_a_context_that_the_model_was_not_made_for(tmp_path: Path) -> None:
    made_for_1000 = folder(tmp_path)

    def check(model: ModelFolder, **engine: Any) -> None:
        config = EngineConfig(model_path=str(tmp_path), **engine)
        launch.check_context_length("serving.student", config, model)

    check(made_for_1000)
    check(made_for_1000, context_length=1000)
    check(made_for_1000, context_length=1001, addresses=("http://127.0.0.1:1",))
    check(folder(tmp_path, rope_scaling={"factor": 4.0}), context_length=1001)
    with pytest.raises(ConfigError, match=r"serving.student.context_length is 1001, but .* 1000"):
        check(made_for_1000, context_length=1001)
