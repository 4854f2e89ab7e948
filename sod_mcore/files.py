"""Writing files and folders so that a crash leaves the old content or the new one, never half."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

AT_FDCWD = -100
RENAME_EXCHANGE = 2
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a system says that has no room left, on the disk or for this user."""
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
"""What a kernel, and a file system, say that cannot exchange two names."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError say ``path`` where it names no file: a failed write or sync does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Let a full disk say ``path``, whatever was written there: shutil.copyfile would first name
    the file that it read."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; it is synced and takes its name when all went well.

    The name begins with a dot, and part of it is random: processes of several nodes, which may have
    the same id, do not share it in a common folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


def create_text(path: Path, text: str) -> bool:
    """Write ``text`` to ``path`` atomically, unless the file is there; whether it was written.

    Of processes that do so at the same time, or while one calls :func:`write_text`, none replaces
    what another has written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    complete = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    write_text(complete, text)
    try:
        os.link(complete, path)
    except FileExistsError:
        return False
    finally:
        complete.unlink()
    return True


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a temporary folder beside ``path``; it is synced and takes its name when all went well.

    An existing folder ``path`` is replaced. Only one process may write ``path`` at a time: what a
    killed one has left under the temporary name is removed.
    """
    temporary = temporary_folder(path)
    make_empty(temporary)
    try:
        yield temporary
        replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_folder(path: Path) -> Path:
    """Where the content of the folder ``path`` is gathered before it takes its name."""
    return path.with_name(f".{path.name}.tmp")


def make_empty(folder: Path) -> None:
    """Make ``folder`` and its parents; what it held is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def replace_folder(temporary: Path, path: Path) -> None:
    """Sync ``temporary`` and give it the name ``path``, whose old content goes away afterwards.

    Where the system can exchange two names, ``path`` is there at every moment.
    """
    for entry in [*temporary.rglob("*"), temporary]:
        _sync(entry)
    old = path.with_name(f".{path.name}.old")
    _remove(old)
    if not os.path.lexists(path):
        temporary.rename(path)
    elif _exchange(temporary, path):
        temporary.rename(old)
    else:
        path.rename(old)
        temporary.rename(path)
    _sync(path.parent)
    _remove(old)


def _exchange(first: Path, second: Path) -> bool:
    """Let two existing files or folders swap their names in one step; False where none can."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = (AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second))
    if renameat2(*names, RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
