"""Weights by value: what is sent, in which order, and what is never sent, with scripted engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sod_mcore.serving.weights.tensor_check import Bucket, engine_shapes
from sod_mcore.serving.weights.tensor_transfer import TensorTransfer
from sod_mcore.serving.weights.transfer import WeightUpdateError
from sod_mcore.serving.weights.update import update_weights, weight_versions
from tests.serving.scripted_engines import ScriptedEngines, running_engines
from tests.serving.small_weights import EMBEDDING, HEAD, NORM, new_buckets, write_folder

TIMEOUT = 60.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path, tied=True)


def send(engines: ScriptedEngines, buckets: list[Bucket], version: int = 5) -> None:
    update_weights(engines.endpoints, "student", TensorTransfer(iter(buckets)), version, TIMEOUT)


def refused(folder: Path, buckets: list[Bucket], message: str) -> ScriptedEngines:
    """Engines after an update that must fail with ``message``."""
    with running_engines(ScriptedEngines(folder)) as engines:
        with pytest.raises(WeightUpdateError, match=message):
            send(engines, buckets)
        assert weight_versions(engines.endpoints, "student", TIMEOUT) == (0, 0)
        assert "continue" not in engines.call_names()
        return engines


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_engine_gets_every_tensor(folder: Path, dtype: torch.dtype) -> None:
    with running_engines(ScriptedEngines(folder)) as engines:
        send(engines, new_buckets(dtype))
        assert weight_versions(engines.endpoints, "student", TIMEOUT) == (5, 5)
    calls = engines.call_names()
    assert calls == [
        name
        for name in ("pause", "begin", "bucket", "bucket", "bucket", "end", "continue")
        for _ in range(2)
    ]
    for received in engines.received:
        buckets = [bucket.tensors[0] for bucket in received]
        for found, sent in zip(buckets, [*new_buckets(dtype), []], strict=True):
            for (name, tensor), (sent_name, sent_tensor) in zip(found, sent, strict=True):
                assert name == sent_name
                assert tensor.dtype == dtype
                assert torch.equal(tensor, sent_tensor)


def test_version_and_empty_cache_come_with_the_last_bucket(folder: Path) -> None:
    with running_engines(ScriptedEngines(folder)) as engines:
        send(engines, new_buckets())
    options = [(bucket.version, bucket.flush_cache) for bucket in engines.received[0]]
    assert options == [(None, False), (None, False), ("5", True)]


def test_a_slice_travels_without_the_tensor_that_it_was_cut_from(folder: Path) -> None:
    with running_engines(ScriptedEngines(folder)) as engines:
        send(engines, new_buckets())
    assert len(engines.received[0][0].payloads[0]) < 2000  # 5 of 4000 rows


def test_a_payload_of_several_pieces(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    large = torch.arange(2_000_003, dtype=torch.float32)
    save_file({NORM: torch.zeros_like(large)}, tmp_path / "model.safetensors")
    with running_engines(ScriptedEngines(tmp_path)) as engines:
        send(engines, [[(NORM, large)]])
    assert torch.equal(engines.received[1][0].tensors[0][0][1], large)


def test_each_rank_of_an_engine_gets_a_payload(folder: Path) -> None:
    with running_engines(ScriptedEngines(folder, tensor_parallel_sizes=(3, 3))) as engines:
        send(engines, new_buckets())
    assert [len(bucket.tensors) for bucket in engines.received[0]] == [3, 3, 3]
    assert torch.equal(engines.received[0][1].tensors[2][0][1], new_buckets()[1][0][1])


def test_engines_without_sessions(folder: Path) -> None:
    with running_engines(ScriptedEngines(folder, session=False)) as engines:
        send(engines, new_buckets())
        assert weight_versions(engines.endpoints, "student", TIMEOUT) == (5, 5)
    assert not {"begin", "end"} & set(engines.call_names())


def test_an_engine_that_fails_half_way_is_mended_by_the_next_update(folder: Path) -> None:
    with running_engines(ScriptedEngines(folder, refusing=1, accepted_buckets=1)) as engines:
        with pytest.raises(WeightUpdateError, match=r"version 5 not loaded: .*out of memory"):
            send(engines, new_buckets())
        assert weight_versions(engines.endpoints, "student", TIMEOUT) == (0, 0)
        assert not {"end", "continue"} & set(engines.call_names())
        engines.refusing = None
        send(engines, new_buckets())
        assert weight_versions(engines.endpoints, "student", TIMEOUT) == (5, 5)
        assert engines.call_names()[-2:] == ["continue"] * 2
        assert engines.is_open == [False, False]


def test_buckets_are_made_only_when_the_last_one_has_arrived(folder: Path) -> None:
    arrived = []
    with running_engines(ScriptedEngines(folder)) as engines:

        def buckets() -> Iterator[Bucket]:
            for bucket in new_buckets():
                arrived.append([len(received) for received in engines.received])
                yield bucket

        update_weights(engines.endpoints, "student", TensorTransfer(buckets()), 5, TIMEOUT)
    assert arrived == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.norm.bias", torch.zeros(3), r"no weight 'model\.norm\.bias'"),
        (NORM, torch.zeros(4), r"norm\.weight has shape \(4,\), in the engine \(3,\)"),
        (NORM, torch.tensor([0, torch.nan, 0]), "norm.weight has values that are not finite"),
        (NORM, torch.tensor([0, 0, -torch.inf]), "norm.weight has values that are not finite"),
        (HEAD, torch.zeros(5, 3), "no weight 'lm_head.weight'"),
    ],
)
def test_what_an_engine_would_die_of_or_drop_is_not_sent(
    folder: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    engines = refused(folder, [new_buckets()[0], [(name, tensor)]], message)
    assert [len(received) for received in engines.received] == [1, 1]


def test_a_missing_tensor(folder: Path) -> None:
    refused(folder, new_buckets()[:1], r"1 of the engine's weights .* 'model\.norm\.weight'")


def test_an_engine_folder_that_cannot_be_read(tmp_path: Path) -> None:
    engines = refused(tmp_path, new_buckets(), f"{tmp_path}.* serving.weight_sync=disk")
    assert not engines.calls


def test_the_output_layer_belongs_to_untied_models_only(tmp_path: Path) -> None:
    for tied in (True, False):
        engines = ScriptedEngines(write_folder(tmp_path / str(tied), tied=tied))
        shapes = engine_shapes(engines.endpoints.model("student"))
        expected = {EMBEDDING: (5, 3), NORM: (3,)}
        assert shapes == (expected if tied else {**expected, HEAD: (5, 3)})
