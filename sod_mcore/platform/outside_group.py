"""A process group that this process shares with processes outside of its default world.

``torch.distributed.new_group`` only makes groups of the default world's ranks, so SGLang 0.5.23 and
its relatives call torch's private ``_new_process_group_helper`` (``init_custom_process_group`` in
srt/utils/common.py), which enters the group into torch's registries. Here the backend's own class
is used (torch 2.13.0): nothing that ``torch.distributed`` knows changes.

The ranks of both sides find each other in a store under keys that torch and SGLang prefix with the
group's name, the name and a slash, and the first device type of the backend and a slash. Only the
NCCL side of this file has never run: it needs GPUs.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

BackendName = Literal["gloo", "nccl"]
DEVICE_PREFIXES: dict[BackendName, str] = {"gloo": "cpu/", "nccl": "cuda/"}
BACKLOG = 128


class OutsideGroupError(Exception):
    """Another rank did not join in time, is gone, or did not take a tensor in time."""


class OutsideGroup:
    """Rank 0 of the group, which broadcasts to all others.

    It listens when it is made, so that the others can be told where; :meth:`join` waits for them.

    Args:
        name: the group's; unique among all that any of its processes ever joined.
        address: of this machine, as the other processes reach it; only there it listens.
        world_size: ranks, this one included.
        backend: "nccl" if all ranks have GPUs of their own.
        join_seconds: longest wait for the other ranks.
        broadcast_seconds: longest wait until they have one tensor.
    """

    def __init__(
        self,
        name: str,
        address: str,
        world_size: int,
        backend: BackendName,
        join_seconds: float,
        broadcast_seconds: float,
    ) -> None:
        self.name = name
        self.address = address
        self.world_size = world_size
        self.backend = backend
        self._join_timeout = timedelta(seconds=join_seconds)
        self._broadcast_timeout = timedelta(seconds=broadcast_seconds)
        self._store: dist.TCPStore | None = _listen(address, world_size, self._join_timeout)
        self.port = self._store.port
        self._group: Any = None  # torch's stubs lack the methods of a backend

    def join(self) -> None:
        """Wait until every rank is there.

        Raises:
            OutsideGroupError: one is not.
        """
        try:
            self._group = self._make_group()
        except RuntimeError as error:
            raise OutsideGroupError(_first_line(error)) from None

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Send contiguous tensors, on a device of the backend, to every rank.

        Raises:
            OutsideGroupError: a rank is gone, or did not take one of them in time.
        """
        if self._group is None:
            raise OutsideGroupError(f"the group {self.name} has been left")
        # No reference to the operations may stay behind, in a traceback for instance: they keep the
        # connections open, and with them ranks that wait for more.
        works: list[dist.Work] = []
        try:
            works = [
                self._group.broadcast(tensor, 0, self._broadcast_timeout) for tensor in tensors
            ]
            while works:
                works.pop(0).wait()
        except RuntimeError as error:
            raise OutsideGroupError(_first_line(error)) from None
        finally:
            works.clear()

    @property
    def is_open(self) -> bool:
        """Whether it has not been left."""
        return self._store is not None

    def leave(self) -> None:
        """Close all connections: ranks that wait for this one get an error instead of waiting."""
        if self._group is not None:
            self._group.abort()  # NCCL's operations end; gloo's end with the last reference
        self._group = self._store = None

    def _make_group(self) -> dist.ProcessGroupGloo | dist.ProcessGroupNCCL:
        assert self._store is not None, "the group has been left"
        if self.backend == "gloo":
            return dist.ProcessGroupGloo(
                self._prefixed(self._store), 0, self.world_size, timeout=self._join_timeout
            )
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._broadcast_timeout
        return dist.ProcessGroupNCCL(self._prefixed(self._store), 0, self.world_size, options)

    def _prefixed(self, store: dist.Store) -> dist.Store:
        by_name = dist.PrefixStore(f"{self.name}/", dist.PrefixStore(self.name, store))
        return dist.PrefixStore(DEVICE_PREFIXES[self.backend], by_name)


def address_towards(urls: Sequence[str]) -> str:
    """The IPv4 address of this machine under which all servers of ``urls`` can reach it.

    Raises:
        OSError: the name of one of them cannot be resolved, or there is no way to it.
    """
    addresses = {_address_towards(url) for url in urls}
    outer = sorted(address for address in addresses if not address.startswith("127."))
    return outer[0] if outer else min(addresses)


def _address_towards(url: str) -> str:
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "", parts.port or 80))  # sends nothing, picks the way
        return str(probe.getsockname()[0])


def _listen(address: str, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """A store whose server listens on one address; torch's own listens on all of them."""
    listener = socket.socket()
    try:
        listener.bind((address, 0))
        listener.listen(BACKLOG)
        port = listener.getsockname()[1]
        return dist.TCPStore(
            address,
            port,
            world_size,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    finally:
        listener.close()


def _first_line(error: Exception) -> str:
    """Torch adds a traceback of its own to some messages."""
    return str(error).partition("\n")[0]
