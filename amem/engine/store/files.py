"""File-system steps of the disk tier. Nothing here follows a symbolic link or trusts a path twice."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from amem.engine.store.config import StoreError

DIR_MODE = 0o700
FILE_MODE = 0o600
FORMAT_LINE = b"amem-kv 1\n"
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def claim(root: Path) -> int:
    """Create the directory if need be and take it for this process until the returned descriptor is closed.

    Raises StoreError when another process has it, when it is of another format, or when it cannot be written.
    """
    try:
        root.mkdir(mode=DIR_MODE, parents=True, exist_ok=True)
        lock = os.open(root / "LOCK", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    except OSError as error:
        raise StoreError(
            f"the KV directory {root} cannot be used: {error.strerror}; choose one you may write"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _check_format(root / "FORMAT")
    except BlockingIOError as error:
        os.close(lock)
        raise StoreError(f"the KV directory {root} is in use by another amem; stop it or choose another") from error
    except OSError as error:
        os.close(lock)
        raise StoreError(f"the KV directory {root} cannot be written: {error.strerror}") from error
    except StoreError:
        os.close(lock)
        raise
    return lock


def _check_format(path: Path) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, FILE_MODE)
    except FileExistsError:
        with open(path, "rb") as file:
            found = file.read(64)
        if found and found != FORMAT_LINE:
            raise StoreError(
                f"{path} says {found!r}, this version reads {FORMAT_LINE!r}; the directory holds only cached KV: "
                "delete it, or start the version that wrote it"
            ) from None
        if found:
            return
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        os.write(fd, FORMAT_LINE)
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path: Path, parts: Iterable[bytes | memoryview], length: int, sync: bool) -> None:
    """Write a new file of exactly `length` bytes, allocated in full first. On any error the file is gone again."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        os.posix_fallocate(fd, 0, length)
        at = 0
        for part in parts:
            view = memoryview(part)
            while len(view):
                done = os.pwrite(fd, view, at)
                at, view = at + done, view[done:]
        if at != length:
            raise OSError(errno.EIO, f"{at} bytes written, {length} planned")
        if sync:
            os.fdatasync(fd)
    except BaseException:
        unlink(path)
        raise
    finally:
        os.close(fd)


def open_exact(path: Path, length: int | None) -> tuple[int, int]:
    """(descriptor, length) of a regular file. With `length`, the file must have just that. Raises OSError."""
    fd = os.open(path, _READ_FLAGS)
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or (length is not None and info.st_size != length):
        os.close(fd)
        raise OSError(errno.EINVAL, f"{info.st_size} bytes, {length} expected, or not a regular file")
    return fd, info.st_size


def map_range(path: Path, length: int, start: int, stop: int) -> memoryview:
    """Bytes start..stop of a file that must be `length` long, mapped read-only.

    The mapping lives as long as a view of it. Raises OSError.
    """
    fd, _ = open_exact(path, length)
    try:
        base = start - start % mmap.ALLOCATIONGRANULARITY
        flags = mmap.MAP_SHARED | _POPULATE
        mapped = mmap.mmap(fd, stop - base, flags=flags, prot=mmap.PROT_READ, offset=base)
        return memoryview(mapped)[start - base : stop - base]
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from error
    finally:
        os.close(fd)


def read_range(fd: int, start: int, stop: int) -> memoryview:
    """Bytes start..stop, read until whole. A bad sector is an OSError here, where a mapping would raise SIGBUS."""
    buffer = bytearray(stop - start)
    view = memoryview(buffer)
    at = 0
    while at < len(buffer):
        done = os.preadv(fd, [view[at:]], start + at)
        if done == 0:
            raise OSError(errno.EIO, f"the file ends {len(buffer) - at} bytes early")
        at += done
    return view


def unlink(path: Path) -> None:
    """Remove a name, whether it is there or not."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def sync_dir(path: Path) -> None:
    """Make names created and removed in a directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def free_bytes(path: Path) -> int:
    info = os.statvfs(path)
    return info.f_bavail * info.f_frsize
