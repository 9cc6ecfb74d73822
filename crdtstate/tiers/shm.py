"""
A tier in the memory of this host: it survives the processes, not the machine's end.

    shm://name?bytes_max=1073741824

Files in ``/dev/shm/crdtstate-<user's number>/<name>``, which nobody else may enter. A file is named
by the hash of its key, as keys are longer than names of files can be, and begins with the key. It
is written under another name and renamed, so readers need no lock. Writers have one, on the
directory: the kernel lifts it when its holder is killed, so whatever is unfinished while we hold
it is the leftover of a killed writer and is removed.

All values together have up to *bytes_max* bytes, a GiB if the URL does not say: nobody else keeps
a program from filling the memory with files.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from crdtstate.errors import TierError, UsageError
from crdtstate.tiers import Item, bytes_option, check_size, split_url
from crdtstate.tiers.calls import Blocking

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108

BYTES_MAX = 2**30
"""Of all values of a tier together."""

CALL_SECONDS = 10.0
"""The limit of a call. Memory is quick; it is for those who wait behind others."""

LOCK_SECONDS = 2.0
"""How long to wait for another process that writes. One that was stopped holds the lock."""

LOCK_PAUSE = 0.002

MAGIC = b"crdtshm1"
HEAD_BYTES = len(MAGIC) + 2
"""Before the key: the magic and the key's length."""

UNFINISHED = ".new"


class SharedMemoryTier(Blocking):
    """See `crdtstate.tiers.Tier`."""

    def __init__(self, url: str, name: str, bytes_max: int) -> None:
        super().__init__(url, CALL_SECONDS)
        self._name = name
        self._bytes_max = bytes_max

    # In the thread

    def _put(self, key: str, data: bytes) -> None:
        name = _file_name(key)
        head = _head(key)
        with self._directory() as directory, self._locked(directory):
            used = self._clean(directory, replaced=name)
            if used + len(head) + len(data) > self._bytes_max:
                raise self._full(f"{used} of {self._bytes_max} bytes are taken")
            unfinished = name + UNFINISHED
            try:
                _write(directory, unfinished, head, data)
                os.rename(unfinished, name, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                with suppress(OSError):
                    os.unlink(unfinished, dir_fd=directory)
                raise

    def _get(self, key: str) -> bytes | None:
        with self._directory() as directory:
            try:
                file = os.open(_file_name(key), os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
            except FileNotFoundError:
                return None
            with open(file, "rb", buffering=0) as opened:
                head = _head(key)
                check_size(self.url, key, os.fstat(file).st_size - len(head))
                if opened.read(len(head)) != head:
                    raise TierError(self.url, f"the file of {key} was not written by crdtstate")
                return opened.readall()

    def _delete(self, key: str) -> None:
        with self._directory() as directory, suppress(FileNotFoundError):
            os.unlink(_file_name(key), dir_fd=directory)

    def _items(self, prefix: str) -> list[Item]:
        with self._directory() as directory:
            found = (_item(directory, name) for name in os.listdir(directory))
            items = [item for item in found if item and item.key.startswith(prefix)]
        return sorted(items, key=lambda item: item.key)

    def _clean(self, directory: int, replaced: str) -> int:
        """Remove what killed writers left, and return how many bytes all but *replaced* have."""
        used = 0
        with os.scandir(directory) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.name.endswith(UNFINISHED):
                        os.unlink(entry.name, dir_fd=directory)
                    elif entry.name != replaced:
                        used += entry.stat(follow_symlinks=False).st_size
        return used

    @contextmanager
    def _directory(self) -> Iterator[int]:
        """Open this tier's directory; make it if need be. It is opened anew for each call, as
        somebody may have cleared /dev/shm in between."""
        try:
            parent = self._enter(SHARED_MEMORY / f"crdtstate-{os.geteuid()}", None)
            try:
                directory = self._enter(Path(self._name), parent)
            finally:
                os.close(parent)
            try:
                yield directory
            finally:
                os.close(directory)
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._full("the memory of this host for files is") from exc
            reason = f"{exc.strerror}; check {SHARED_MEMORY}/crdtstate-{os.geteuid()}/{self._name}"
            raise TierError(self.url, reason) from exc

    def _enter(self, path: Path, parent: int | None) -> int:
        with suppress(FileExistsError):
            os.mkdir(path, 0o700, dir_fd=parent)
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        found = os.fstat(directory)
        # Everybody may make a directory in /dev/shm, under our name, too.
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            os.close(directory)
            mode = stat.filemode(found.st_mode)
            reason = f"others may enter {path} ({mode}, of user {found.st_uid}); remove it"
            raise TierError(self.url, reason)
        return directory

    @contextmanager
    def _locked(self, directory: int) -> Iterator[None]:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    reason = f"another process has been writing to it for {LOCK_SECONDS:g} s"
                    raise TierError(self.url, f"{reason}; end that process") from None
            time.sleep(LOCK_PAUSE)
        try:
            yield
        finally:
            # Closing would not do if the process was forked meanwhile.
            fcntl.flock(directory, fcntl.LOCK_UN)

    def _full(self, how: str) -> TierError:
        advice = "keep fewer checkpoints in it, or give it more with ?bytes_max="
        return TierError(self.url, f"it is full: {how}; {advice}")


def _file_name(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def _head(key: str) -> bytes:
    return MAGIC + len(key).to_bytes(2, "big") + key.encode()


def _write(directory: int, name: str, *parts: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(name, flags, 0o600, dir_fd=directory), "wb", buffering=0) as file:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[file.write(rest) :]


def _item(directory: int, name: str) -> Item | None:
    """What a file holds; None if it is gone by now, unfinished, or none of ours."""
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except OSError:
        return None
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            return None
        head = os.pread(file, HEAD_BYTES, 0)
        length = int.from_bytes(head[len(MAGIC) :], "big")
        key = os.pread(file, length, HEAD_BYTES).decode(errors="replace")
        if not head.startswith(MAGIC) or _file_name(key) != name:
            return None
        return Item(key, found.st_size - HEAD_BYTES - length, found.st_mtime)
    finally:
        os.close(file)


def _parse(url: str) -> tuple[str, int]:
    parts, options = split_url(url, "bytes_max")
    if parts.path or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", parts.netloc):
        raise UsageError(f"{url}: shm:// takes a name of letters, digits and _.- and no path")
    if not SHARED_MEMORY.is_dir():
        reason = f"needs {SHARED_MEMORY}, which this system does not have"
        raise UsageError(f"{url}: shm:// {reason}; use sqlite:// instead")
    return parts.netloc, bytes_option(url, options, None) or BYTES_MAX


def check_url(url: str) -> None:
    """See `crdtstate.tiers.check_url`."""
    _parse(url)


async def open_tier(url: str) -> SharedMemoryTier:
    """See `crdtstate.tiers.open_tier`."""
    return SharedMemoryTier(url, *_parse(url))
