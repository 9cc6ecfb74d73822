"""
The graph as a file that people read, compare and commit: JSON Lines, as the official server has it.

The store is what counts; the file follows it. The process that keeps the store writes the file,
soon after a change and when it ends, into a new file that takes the place of the old one.

What others write into the file (an editor, ``git pull``, the official server) is taken in: what it
says and the graph lacks is added. What is missing in it is *not* deleted, as nobody can tell a fact
that was removed from one that its writer had never seen; it is there again with the next writing.
Delete with the tools. Lines that say nothing (the marks of a merge conflict, say) are left out;
then the file as it was is kept beside, as ``<file>.before-<time>``.

Whether others wrote is told by the hash of what was written last, in ``<file>.exported``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from crdtstate.errors import StoreError
from crdtstate.integrations.mcp_memory.tools import NAME_CHARS_MAX, TEXT_CHARS_MAX

log = logging.getLogger("crdtstate")

FILE_BYTES_MAX = 256 * 2**20
"""What is read at most; a graph of a million facts takes about half."""

HASHES = 2
"""Of the last writings that are remembered: a kill may leave the one or the other."""


class Facts(NamedTuple):
    """What a file says.

    Attributes:
        entities: As (name, type, observations),
        relations: and as (from, type, to).
        unread: The numbers of the lines that say nothing.
    """

    entities: list[tuple[str, str, list[str]]]
    relations: list[tuple[str, str, str]]
    unread: list[int]


class MemoryFile:
    """The file; all methods may be called from a thread, one at a time.

    Args:
        path: The file, which need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._note = Path(f"{path}.exported")
        # What the file looked like when it was read or written last.
        self._seen: tuple[int, ...] | None = None
        # The hash of what it said then.
        self._says = ""

    def is_altered(self) -> bool:
        """Whether it may have been written to since it was read or written here; a mere look."""
        return self._look() != self._seen

    def read_altered(self) -> Facts | None:
        """What others have written into the file; None if nobody has, or it is gone or empty.

        Raises:
            StoreError: It cannot be read.
        """
        looks = self._look()
        data = self._read()
        self._seen, self._says = looks, _hash(data)
        if not data.strip() or self._says in self._hashes():
            return None
        facts = parse(data)
        if facts.unread:
            self._keep_beside(data, facts.unread)
        return facts

    def write(self, lines: Iterable[str]) -> None:
        """Have it say these lines, if it does not.

        Raises:
            StoreError: It cannot be written; it is as it was.
        """
        data = "\n".join(lines).encode()
        mark = _hash(data)
        try:
            if mark == self._says and not self.is_altered():
                return
            hashes = [each for each in self._hashes() if each != mark]
            # First: a file in place whose hash is not known would pass for others' writing.
            _replace(self._note, "\n".join([*hashes, mark][-HASHES:]).encode(), 0o600)
            _replace(self.path, data, self._mode())
        except OSError as exc:
            raise StoreError(self.path, f"cannot be written: {exc.strerror}") from exc
        self._seen, self._says = self._look(), mark

    def _read(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                data = file.read(FILE_BYTES_MAX + 1)
        except FileNotFoundError:
            return b""
        except OSError as exc:
            raise StoreError(self.path, f"cannot be read: {exc.strerror}") from exc
        if len(data) > FILE_BYTES_MAX:
            raise StoreError(self.path, f"has more than {FILE_BYTES_MAX:,} bytes; split it")
        return data

    def _look(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _mode(self) -> int:
        """Who may read it: as before, or only its user."""
        with suppress(OSError):
            return stat.S_IMODE(os.stat(self.path).st_mode)
        return 0o600

    def _hashes(self) -> list[str]:
        with suppress(OSError):
            with open(self._note, "rb") as file:
                return file.read(1000).decode(errors="replace").split("\n")
        return []

    def _keep_beside(self, data: bytes, unread: list[int]) -> None:
        when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        beside = Path(f"{self.path}.before-{when}-{_hash(data)[:8]}")
        try:
            _replace(beside, data, self._mode())
        except OSError as exc:
            raise StoreError(beside, f"cannot be written: {exc.strerror}") from exc
        numbers = ", ".join(map(str, unread[:5])) + (", ..." if len(unread) > 5 else "")
        log.warning("%s: line %s left out; as it was it is in %s", self.path, numbers, beside)


def parse(data: bytes) -> Facts:
    """What a file says: of its lines those that are facts."""
    entities: list[tuple[str, str, list[str]]] = []
    relations: list[tuple[str, str, str]] = []
    unread = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            item = None
        if (entity := _entity(item)) is not None:
            entities.append(entity)
        elif (relation := _relation(item)) is not None:
            relations.append(relation)
        else:
            unread.append(number)
    return Facts(entities, relations, unread)


def _entity(item: Any) -> tuple[str, str, list[str]] | None:
    match item:
        case {
            "type": "entity",
            "name": str(name),
            "entityType": str(kind),
            "observations": list(texts),
        }:
            is_text = _is_text(name) and _is_text(kind)
            if is_text and all(_is_text(text, TEXT_CHARS_MAX) for text in texts):
                return name, kind, texts
    return None


def _relation(item: Any) -> tuple[str, str, str] | None:
    match item:
        case {
            "type": "relation",
            "from": str(source),
            "to": str(target),
            "relationType": str(kind),
        }:
            if all(map(_is_text, (source, kind, target))):
                return source, kind, target
    return None


def _is_text(given: Any, most: int = NAME_CHARS_MAX) -> bool:
    if type(given) is not str or len(given) > most:
        return False
    try:
        given.encode()
    except UnicodeEncodeError:
        return False
    return True


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _replace(path: Path, data: bytes, mode: int) -> None:
    """Have a file of these bytes take the place of *path*, whole or not at all."""
    new = Path(f"{path}.{os.getpid()}.tmp")
    with suppress(FileNotFoundError):
        # Of a process that was killed, and had the same number.
        new.unlink()
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        try:
            os.fchmod(file, mode)
            with open(file, "wb", closefd=False) as out:
                out.write(data)
        finally:
            os.close(file)
        os.replace(new, path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
