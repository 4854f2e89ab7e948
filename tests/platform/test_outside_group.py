"""A group outside of torch's default world: who can reach it, what arrives, what leaving does."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sod_mcore.platform.outside_group import OutsideGroup, OutsideGroupError, address_towards
from tests.serving.scripted_group import ScriptedRanks

SECONDS = 2.0
LISTENING = "0A"
"""State of a socket in /proc/net/tcp."""


def new_group(name: str = "test") -> OutsideGroup:
    return OutsideGroup(name, "127.0.0.1", 2, "gloo", join_seconds=SECONDS, broadcast_seconds=60.0)


def invitation(group: OutsideGroup) -> dict[str, Any]:
    """What the other rank is told."""
    return {
        "master_address": group.address,
        "master_port": group.port,
        "world_size": group.world_size,
        "group_name": group.name,
        "backend": group.backend,
        "rank_offset": 1,
    }


def announcement(group: OutsideGroup, tensor: torch.Tensor) -> dict[str, Any]:
    """What the other rank is told of a broadcast."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    shapes = [list(tensor.shape)]
    return {"names": ["a"], "dtypes": [dtype], "shapes": shapes, "group_name": group.name}


async def join_both(group: OutsideGroup) -> ScriptedRanks:
    other = ScriptedRanks()
    _, failure = await asyncio.gather(
        asyncio.to_thread(group.join), other.join(invitation(group), size=1)
    )
    assert failure is None
    return other


def test_it_listens_on_its_address_only() -> None:
    group = new_group()
    sockets = [
        line.split()[1:4:2]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    port = f":{group.port:04X}"
    local = [address for address, state in sockets if address.endswith(port) and state == LISTENING]
    assert local == [f"0100007F{port}"]
    group.leave()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_groups_at_once_beside_no_world(dtype: torch.dtype) -> None:
    async def run() -> None:
        groups = [new_group("first"), new_group("second")]
        for number, group in enumerate(groups):
            other = await join_both(group)
            tensor = torch.arange(6, dtype=dtype).view(2, 3) + number
            _, received = await asyncio.gather(
                asyncio.to_thread(group.broadcast, [tensor]),
                other.receive(announcement(group, tensor)),
            )
            assert not isinstance(received, str), received
            assert torch.equal(received[0][0][1], tensor)
        for group in groups:
            group.leave()

    asyncio.run(run())
    assert not dist.is_initialized()


def test_nobody_joins() -> None:
    group, start = new_group(), time.monotonic()
    with pytest.raises(OutsideGroupError, match="timeout"):
        group.join()
    assert time.monotonic() - start < 3 * SECONDS
    group.leave()


def test_leaving_releases_a_rank_that_waits() -> None:
    async def run() -> str | tuple[object, ...]:
        group = new_group()
        other = await join_both(group)
        waiting = asyncio.create_task(other.receive(announcement(group, torch.zeros(1))))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        group.leave()
        with pytest.raises(OutsideGroupError, match="has been left"):
            group.broadcast([torch.zeros(1)])
        return await asyncio.wait_for(waiting, SECONDS)

    assert "onnection" in str(asyncio.run(run()))


def test_a_rank_that_is_gone_fails_the_broadcast() -> None:
    async def run() -> None:
        group = new_group()
        (await join_both(group)).die()
        with pytest.raises(OutsideGroupError, match="onnection"):
            group.broadcast([torch.zeros(1 << 20)])
        group.leave()

    asyncio.run(run())


def test_the_address_is_the_one_that_all_servers_can_reach() -> None:
    assert address_towards(["http://127.0.0.1:30000", "http://localhost:30001"]) == "127.0.0.1"
    with pytest.raises(OSError, match=r"resol|known"):
        address_towards(["http://no.such.host.invalid:30000"])
