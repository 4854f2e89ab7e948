"""The order of a weight update, and what an engine that refuses causes, with scripted engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sod_mcore.serving.weights.disk_transfer import DiskTransfer
from sod_mcore.serving.weights.transfer import WeightUpdateError
from sod_mcore.serving.weights.update import update_weights, weight_versions
from tests.serving.scripted_engines import ScriptedEngines, running_engines


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    save_file({"weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def test_all_stand_still_before_any_is_changed(folder: Path) -> None:
    with running_engines() as engines:
        assert weight_versions(engines.endpoints, "student", 10) == (0, 0)
        update_weights(engines.endpoints, "student", DiskTransfer(folder), 5, 10)
        assert weight_versions(engines.endpoints, "student", 10) == (5, 5)
    calls = engines.call_names()
    assert calls == ["pause"] * 2 + ["update and flush"] * 2 + ["continue"] * 2
    assert {index for index, _ in engines.calls[:2]} == {0, 1}
    assert engines.mode == "retract"


def test_running_requests_can_be_ended(folder: Path) -> None:
    with running_engines() as engines:
        update_weights(
            engines.endpoints, "student", DiskTransfer(folder), 5, 10, running_requests="abort"
        )
    assert engines.mode == "abort"


@pytest.mark.parametrize("is_busy", [False, True])
def test_requests_that_go_on_in_place_keep_the_cache(folder: Path, is_busy: bool) -> None:
    """An engine whose cache is in use refuses to empty it; that must not fail the update."""
    with running_engines(ScriptedEngines(is_busy=is_busy)) as engines:
        update_weights(
            engines.endpoints, "student", DiskTransfer(folder), 5, 10, running_requests="in_place"
        )
        assert weight_versions(engines.endpoints, "student", 10) == (5, 5)
    assert engines.mode == "in_place"
    steps = ["pause", "update", "continue"] if is_busy else ["pause", "update", "flush", "continue"]
    assert engines.call_names() == [step for step in steps for _ in range(2)]


def test_an_engine_that_cannot_empty_its_cache(folder: Path) -> None:
    """Any other answer than that requests are running is a failure."""
    with (
        running_engines(ScriptedEngines(has_broken_cache=True)) as engines,
        pytest.raises(WeightUpdateError, match=r"flush_cache answered 500"),
    ):
        update_weights(
            engines.endpoints, "student", DiskTransfer(folder), 5, 10, running_requests="in_place"
        )
    assert "continue" not in engines.call_names()


def test_an_engine_that_refuses_leaves_all_paused(folder: Path) -> None:
    with running_engines() as engines:
        engines.refusing = 1
        with pytest.raises(WeightUpdateError, match=r"version 5 not loaded: .* 400: .*shapes"):
            update_weights(engines.endpoints, "student", DiskTransfer(folder), 5, 10)
        assert "continue" not in engines.call_names()
        engines.refusing = None
        update_weights(engines.endpoints, "student", DiskTransfer(folder), 5, 10)
        assert engines.call_names()[-2:] == ["continue"] * 2


def test_an_engine_that_reports_another_version(folder: Path) -> None:
    with running_engines() as engines:
        engines.forgetful = 1
        with pytest.raises(WeightUpdateError, match="took weight version 5 but reports version 0"):
            update_weights(engines.endpoints, "student", DiskTransfer(folder), 5, 10)
        assert "continue" not in engines.call_names()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_folder_is_not_sent(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with running_engines() as engines, pytest.raises(WeightUpdateError, match="lacks config"):
        update_weights(engines.endpoints, "student", DiskTransfer(folder), 5, 10)
    assert not engines.calls


def test_a_negative_version(folder: Path) -> None:
    with running_engines() as engines, pytest.raises(ValueError, match="version is -1"):
        update_weights(engines.endpoints, "student", DiskTransfer(folder), -1, 10)
