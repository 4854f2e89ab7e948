"""Weights through a process group: who is in it, what arrives, and what ends it, with scripted
engines whose ranks are real ones of gloo."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sod_mcore.serving.weights.distributed_transfer import DistributedTransfer
from sod_mcore.serving.weights.kept_groups import KeptGroups
from sod_mcore.serving.weights.tensor_check import Bucket
from sod_mcore.serving.weights.transfer import WeightUpdateError
from sod_mcore.serving.weights.update import update_weights, weight_versions
from tests.serving.scripted_engines import ScriptedEngines, running_engines
from tests.serving.small_weights import NORM, new_buckets, write_folder

TIMEOUT = 60.0
SHORT = 2.0
"""Seconds, for what must run into it."""


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[ScriptedEngines]:
    with running_engines(ScriptedEngines(write_folder(tmp_path, tied=True))) as engines:
        yield engines


def keep_groups(engines: ScriptedEngines, timeout: float = TIMEOUT) -> KeptGroups:
    return KeptGroups(engines.endpoints, torch.device("cpu"), timeout)


def send(
    engines: ScriptedEngines, groups: KeptGroups, version: int, buckets: Sequence[Bucket] = ()
) -> None:
    transfer = DistributedTransfer(iter(buckets or new_buckets()), groups)
    update_weights(engines.endpoints, "student", transfer, version, TIMEOUT)


def versions(engines: ScriptedEngines) -> tuple[int, ...]:
    return weight_versions(engines.endpoints, "student", TIMEOUT)


def fail(engines: ScriptedEngines, groups: KeptGroups, message: str) -> float:
    """Seconds that an update takes that must fail with ``message``."""
    start = time.monotonic()
    with pytest.raises(WeightUpdateError, match=message):
        send(engines, groups, 5)
    seconds = time.monotonic() - start
    assert versions(engines) == (0, 0)
    assert "continue" not in engines.call_names()
    return seconds


def check_mended(engines: ScriptedEngines, groups: KeptGroups) -> None:
    """The next update reaches every engine, through another group; then none is left."""
    before = set(engines.groups)
    send(engines, groups, 6)
    assert versions(engines) == (6, 6)
    assert engines.call_names()[-2:] == ["continue"] * 2
    assert len(set(engines.groups) - before) == 1
    assert [ranks.open_groups for ranks in engines.ranks] == [1, 1]
    groups.close()
    assert [ranks.open_groups for ranks in engines.ranks] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_of_every_engine_gets_every_tensor(
    engines: ScriptedEngines, dtype: torch.dtype
) -> None:
    engines.tensor_parallel_sizes = (2, 3)
    groups = keep_groups(engines)
    send(engines, groups, 5, new_buckets(dtype))
    assert versions(engines) == (5, 5)
    assert [ranks.ranks for ranks in engines.ranks] == [[1, 2], [3, 4, 5]]
    steps = ("pause", "begin", "join", "bucket", "bucket", "bucket", "end", "continue")
    assert engines.call_names() == [step for step in steps for _ in range(2)]
    for received, size in zip(engines.received, (2, 3), strict=True):
        for rank in range(size):
            for bucket, sent in zip(received, [*new_buckets(dtype), []], strict=True):
                assert [name for name, _ in bucket.tensors[rank]] == [name for name, _ in sent]
                for (_, tensor), (_, expected) in zip(bucket.tensors[rank], sent, strict=True):
                    assert tensor.dtype == dtype
                    assert torch.equal(tensor, expected)
    groups.close()


def test_version_and_empty_cache_come_with_the_last_bucket(engines: ScriptedEngines) -> None:
    groups = keep_groups(engines)
    send(engines, groups, 5)
    options = [(bucket.version, bucket.flush_cache) for bucket in engines.received[0]]
    assert options == [(None, False), (None, False), ("5", True)]
    groups.close()


def test_the_group_is_kept_and_left_at_the_end(engines: ScriptedEngines) -> None:
    groups = keep_groups(engines)
    for version in (5, 6, 7):
        send(engines, groups, version)
        assert versions(engines) == (version, version)
    assert engines.call_names().count("join") == 2
    groups.close()
    assert engines.call_names()[-2:] == ["leave"] * 2
    assert not dist.is_initialized()  # torch's own world is another matter


def test_an_engine_that_was_started_again_joins_a_new_group(engines: ScriptedEngines) -> None:
    groups = keep_groups(engines)
    send(engines, groups, 5)
    engines.ranks[1].die()
    send(engines, groups, 6)
    assert versions(engines) == (6, 6)
    assert len(set(engines.groups)) == 2
    assert [ranks.open_groups for ranks in engines.ranks] == [1, 1]
    groups.close()


def test_engines_without_sessions_get_a_group_for_each_update(tmp_path: Path) -> None:
    """They must not be asked whether they are in one."""
    scripted = ScriptedEngines(write_folder(tmp_path, tied=True), session=False)
    with running_engines(scripted) as engines:
        groups = keep_groups(engines)
        for version in (5, 6):
            send(engines, groups, version)
            assert versions(engines) == (version, version)
        assert not {"begin", "still there", "end"} & set(engines.call_names())
        assert len(set(engines.groups)) == 2
        groups.close()
        assert [ranks.open_groups for ranks in engines.ranks] == [0, 0]


@pytest.mark.timeout(60)
def test_an_engine_that_never_joins(engines: ScriptedEngines) -> None:
    groups = keep_groups(engines, SHORT)
    engines.absent = 0
    url = engines.urls[0]
    seconds = fail(engines, groups, f"version 5 not loaded: {url}/init_.*: no answer.*timeout")
    assert seconds < 4 * SHORT
    engines.absent = None
    check_mended(engines, groups)


@pytest.mark.timeout(60)
def test_an_engine_that_refuses_to_join(engines: ScriptedEngines) -> None:
    groups = keep_groups(engines, SHORT)
    engines.unwilling = 1
    url = engines.urls[1]
    assert fail(engines, groups, f"{url}/init_.* answered 400: .*no such backend") < 4 * SHORT
    engines.unwilling = None
    check_mended(engines, groups)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("index", [0, 1])
def test_an_engine_that_dies_in_a_broadcast(engines: ScriptedEngines, index: int) -> None:
    groups = keep_groups(engines, SHORT)
    engines.tensor_parallel_sizes = (2, 2)
    engines.dying, engines.accepted_buckets = index, 1
    url = engines.urls[index]
    assert fail(engines, groups, f"version 5 not loaded: {url}/update_.*: Server") < 4 * SHORT
    engines.dying = None
    check_mended(engines, groups)


@pytest.mark.timeout(60)
def test_an_engine_that_stands_still_in_a_broadcast(engines: ScriptedEngines) -> None:
    groups = keep_groups(engines, SHORT)
    engines.stuck, engines.accepted_buckets = 1, 1
    url = engines.urls[1]
    assert fail(engines, groups, f"{url}/update_.*: no answer .*Timed out") < 4 * SHORT
    engines.stuck = None
    check_mended(engines, groups)


def test_a_tensor_that_does_not_fit_is_not_sent(engines: ScriptedEngines) -> None:
    groups = keep_groups(engines)
    with pytest.raises(WeightUpdateError, match=r"norm\.weight has shape \(4,\)"):
        send(engines, groups, 5, [new_buckets()[0], [(NORM, torch.zeros(4))]])
    assert [len(received) for received in engines.received] == [1, 1]
    assert versions(engines) == (0, 0)
    check_mended(engines, groups)


def test_pipeline_parallel_engines_are_refused(engines: ScriptedEngines) -> None:
    engines.pipeline_stages = 2
    with pytest.raises(WeightUpdateError, match=r"2 pipeline stages.* set it to disk"):
        send(engines, keep_groups(engines), 5)
    assert "join" not in engines.call_names()
