"""Files and folders that are whole or not there, and a lock that dies with its holder."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError

log = logging.getLogger(__name__)


def write_whole(path: Path, data: bytes) -> None:
    """`path` holds `data` entirely, or is what it was before, also after a kill or a power cut.

    Raises UserError where the folder cannot be made or written (read-only, full, a file in its place).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error


def remove(folder: Path) -> None:
    """A folder of ours goes at once: what a kill leaves of it has another name, and goes the next time."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def tidy(folder: Path, pattern: str) -> None:
    """Remove what killed writers left in `folder`; only for who holds the lock on all that `pattern` matches."""
    for left in folder.glob(pattern):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[None]:
    """One process at a time works on `path`, which need not exist; a lock file lies beside it meanwhile.

    The kernel frees the lock when its holder dies, so a lock file left by a kill means nothing. `wait` False: raises
    UserError if another holds it. Raises UserError, too, where the folder cannot be written.
    """
    place = path.with_name(f".{path.name}.lock")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(place, wait)
    except OSError as error:
        raise _unwritable(place, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(place)  # while it is still locked: who waits for this file sees that it is gone and starts over
        fcntl.flock(handle, fcntl.LOCK_UN)  # a forked child may hold a copy of the handle
        os.close(handle)


def _acquire(place: Path, wait: bool) -> int:
    told = False
    while True:
        handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
                if not wait:
                    raise UserError(f"{place.name[1:-5]} is being made by {holder}; wait for it or stop it") from None
                if not told:
                    log.warning("%s is being made by %s: waiting for it", place.name[1:-5], holder)
                    told = True
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.fstat(handle).st_nlink:  # else its last holder has removed this file: another one counts now
                _sign(handle, place)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _sign(handle: int, place: Path) -> None:
    """Say in the locked file who holds it; on a full disk there is no room for that, and nothing is left."""
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except OSError:
        os.unlink(place)
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror or error}; name a folder that can be written (results.folder=DIR)")
