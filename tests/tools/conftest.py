"""A real sandbox for each test, and the check that it left no process behind."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from sod_mcore.tools import Sandbox, SandboxLimits
from tests.tools.processes import become_subreaper, descendants


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    """Fails if a process or a zombie remains that was not there before."""
    before = descendants()
    become_subreaper(True)
    try:
        yield
        assert descendants() - before == set()
    finally:
        become_subreaper(False)


@pytest.fixture
def readable_directory() -> Iterator[Path]:
    """A directory that an unprivileged user may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest_asyncio.fixture
async def sandbox(nothing_left_behind: None) -> AsyncIterator[Sandbox]:
    """Small limits, so that breaking them is quick."""
    limits = SandboxLimits(wall_seconds=5.0, cpu_seconds=3)
    async with asyncio.timeout(120), Sandbox(limits, warm_count=1) as sandbox:
        yield sandbox
