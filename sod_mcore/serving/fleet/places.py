"""Where the process of a server is started: what ``server.py`` knows of it, and this machine.

The other place is a node of a Ray cluster (``ray_place.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sod_mcore.serving.endpoints import FleetError
from sod_mcore.serving.fleet import launch
from sod_mcore.serving.fleet.children import Child, Children
from sod_mcore.serving.fleet.launch import Address

POLL_SECONDS = 0.5


class NotStartedError(Exception):
    """A process could not be started, but may be later; the message completes "<name> ..."."""


class Running(Protocol):
    """A process that was started."""

    @property
    def url(self) -> str:
        """Base URL of the server that it is, or will be."""
        ...

    @property
    def end(self) -> str | None:
        """How it ended, such as "ended with exit code 1"; None while it runs."""
        ...

    def log_tail(self, lines: int = 30) -> str:
        """The last lines that this process wrote to its log."""
        ...

    async def kill(self) -> bool:
        """End what is left of it and of its children; returns whether all of it is gone."""
        ...


class Place(Protocol):
    """Starts one server, one process after the other."""

    async def start(self, *, anew: bool) -> Running:
        """Start its process.

        Args:
            anew: on an address that it did not have before; else on the last one, where that can
                be had.

        Raises:
            FleetError: it cannot be started.
            NotStartedError: not now.
        """
        ...


@dataclass(frozen=True)
class LocalProcess:
    """A child of this process."""

    url: str
    child: Child
    children: Children

    @property
    def end(self) -> str | None:
        code = self.child.exit_code
        return None if code is None else f"ended with exit code {code}"

    def log_tail(self, lines: int = 30) -> str:
        return self.child.log_tail(lines)

    async def kill(self) -> bool:
        return await asyncio.to_thread(self.children.kill, self.child)


class LocalPlace:
    """This machine.

    Args:
        name: of the server.
        host: it listens there.
        command: its command line for an address.
        environment: None for ours.
        log_path: receives its output.
        children: starts it, and ends it with us.
        say: receives a line while it waits for its port.
    """

    def __init__(
        self,
        name: str,
        *,
        host: str,
        command: Callable[[Address], list[str]],
        environment: Mapping[str, str] | None,
        log_path: Path,
        children: Children,
        say: Callable[[str], None],
    ) -> None:
        self._name = name
        self._host = host
        self._command = command
        self._environment = environment
        self._log_path = log_path
        self._children = children
        self._say = say
        self._port = 0

    async def start(self, *, anew: bool) -> LocalProcess:
        """On another port if ``anew``; else on the port that it had, once that is free."""
        if anew:
            self._port = launch.free_port(self._host)
        else:
            await self._until_port_is_free()
        address = Address(self._host, self._port)
        command = self._command(address)
        try:
            child = self._children.start(
                self._name, command, environment=self._environment, log_path=self._log_path
            )
        except OSError as error:
            raise FleetError(launch.cannot_be_started(command[0], self._log_path, error)) from error
        return LocalProcess(address.url, child, self._children)

    async def _until_port_is_free(self) -> None:
        """Another program may have got the port meanwhile; the addresses must stay true."""
        if launch.is_free_port(self._host, self._port):
            return
        self._say(f"{self._name}: another program has port {self._port}; waiting for its end")
        while not launch.is_free_port(self._host, self._port):
            await asyncio.sleep(POLL_SECONDS)
