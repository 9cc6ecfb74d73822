"""
A disk in memory that fails on command, and SQLite on top of it.

For each file, `Disk` knows what is durable, what programs see, and what was written since the
last sync. At a power cut the durable part stays, with none, some or all of the rest, sector by
sector. A new file's name is durable from its first sync, a deletion only if the directory was
synced: POSIX promises no more. A sync that fails loses what it should have synced, as Linux does:
the next one will not write it again.

Everything is counted in operations, so a test can cut the power at every single one of them.
"""

import random
from pathlib import Path

import apsw

from crdtstate.stores.file import Host

SECTOR = 512


class File:
    """One file: what is durable, what programs see, and the writes in between."""

    def __init__(self, durable: bytes = b"") -> None:
        self.durable = bytearray(durable)
        self.current = bytearray(durable)
        self.unsynced: list[tuple[int, bytes | None]] = []  # None cuts the file at the offset.
        self.is_named = bool(durable)
        self.is_deleted = False
        self.is_deletion_durable = False

    def write(self, offset: int, data: bytes | None) -> None:
        _apply(self.current, offset, data)
        self.unsynced.append((offset, data))

    def sync(self) -> None:
        for offset, data in self.unsynced:
            _apply(self.durable, offset, data)
        self.unsynced.clear()
        self.is_named = True


class Disk:
    """
    Files by name, and the faults to come.

    Attributes:
        operations: Counts writes, truncations, syncs and deletions.
        cut_at: The operation at which the power fails.
        fail_at: The operation that fails, once, without any effect.
        failing: Kinds of operations that fail as long as they are named here.
        capacity: Bytes after which the disk is full.
    """

    def __init__(self) -> None:
        self.files: dict[str, File] = {}
        self.operations = 0
        self.cut_at: int | None = None
        self.fail_at: int | None = None
        self.failing: set[str] = set()
        self.capacity: int | None = None
        self.is_dead = False
        self.vfs = FaultVFS(self, f"fault-{id(self)}")

    def operate(self, kind: str) -> None:
        """Count an operation, and fail it if its time has come."""
        self.operations += 1
        if self.operations == self.cut_at:
            self.is_dead = True
        if self.is_dead:
            raise apsw.IOError("the power is off")
        if kind in self.failing or self.operations == self.fail_at:
            raise apsw.IOError(f"a {kind} failed")

    @property
    def used(self) -> int:
        """Bytes in all files."""
        return sum(len(file.current) for file in self.files.values() if not file.is_deleted)

    def write(self, file: File, offset: int, data: bytes) -> None:
        self.operate("write")
        growth = offset + len(data) - len(file.current)
        if self.capacity is not None and growth > 0 and self.used + growth > self.capacity:
            raise apsw.FullError("the disk is full")
        file.write(offset, data)

    def sync(self, file: File) -> None:
        try:
            self.operate("sync")
        except apsw.IOError:
            file.unsynced.clear()
            raise
        file.sync()

    def reboot(self, keep: str, rng: random.Random) -> None:
        """Bring back what survives; *keep* is none, some or all of what was not synced."""

        def survives() -> bool:
            return keep == "all" or (keep == "some" and rng.random() < 0.5)

        files: dict[str, File] = {}
        for name, file in self.files.items():
            if file.is_deleted and (file.is_deletion_durable or survives()):
                continue
            if not file.is_named and not survives():
                continue
            after = bytearray(file.durable)
            for offset, data in file.unsynced:
                if data is None:
                    if survives():
                        _apply(after, offset, None)
                    continue
                for start in range(0, len(data), SECTOR):
                    if survives():
                        _apply(after, offset + start, data[start : start + SECTOR])
            files[name] = File(after)
        self.files = files
        self.operations = 0
        self.cut_at = self.fail_at = self.capacity = None
        self.failing.clear()
        self.is_dead = False


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
        return
    content.extend(bytes(max(offset - len(content), 0)))
    content[offset : offset + len(data)] = data


class FaultVFS(apsw.VFS):
    """SQLite's view of a `Disk`."""

    def __init__(self, disk: Disk, name: str) -> None:
        self.disk = disk
        self.name = name
        super().__init__(name, base="")

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> "FaultFile":
        name = name.filename() if isinstance(name, apsw.URIFilename) else name
        file = self.disk.files.get(name or "")
        if file is None or file.is_deleted:
            if not flags[0] & (apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_DELETEONCLOSE):
                raise apsw.CantOpenError(f"no file {name}")
            file = File()
            if name:
                self.disk.files[name] = file
        return FaultFile(self.disk, file)

    def xDelete(self, name: str, sync_directory: bool) -> None:
        self.disk.operate("delete")
        file = self.disk.files.get(name)
        if file is None or file.is_deleted:
            error = apsw.IOError(f"no file {name}")
            error.extendedresult = apsw.SQLITE_IOERR_DELETE_NOENT
            raise error
        file.is_deleted = True
        file.is_deletion_durable = sync_directory

    def xAccess(self, name: str, flags: int) -> bool:
        return name in self.disk.files and not self.disk.files[name].is_deleted

    def xFullPathname(self, name: str) -> str:
        return name


class FaultFile:
    """SQLite's view of one `File`."""

    def __init__(self, disk: Disk, file: File) -> None:
        self.disk = disk
        self.file = file

    def xRead(self, amount: int, offset: int) -> bytes:
        if self.disk.is_dead:
            raise apsw.IOError("the power is off")
        return bytes(self.file.current[offset : offset + amount])

    def xWrite(self, data: bytes, offset: int) -> None:
        self.disk.write(self.file, offset, bytes(data))

    def xTruncate(self, size: int) -> None:
        self.disk.operate("truncate")
        self.file.write(size, None)

    def xSync(self, flags: int) -> None:
        self.disk.sync(self.file)

    def xFileSize(self) -> int:
        return len(self.file.current)

    def xClose(self) -> None: ...

    def xLock(self, level: int) -> None: ...

    def xUnlock(self, level: int) -> None: ...

    def xCheckReservedLock(self) -> bool:
        return False

    def xFileControl(self, op: int, pointer: int) -> bool:
        return False

    def xSectorSize(self) -> int:
        return SECTOR

    def xDeviceCharacteristics(self) -> int:
        return 0


class FaultHost(Host):
    """The operating system of a `Disk`. It has one machine, so nothing to lock."""

    has_shared_memory = False

    def __init__(self, path: Path, disk: Disk) -> None:
        super().__init__(path)
        self.disk = disk
        self.vfs = disk.vfs.name

    def lock(self) -> None: ...

    def boot(self) -> str | None:
        return "boot"

    def place(self) -> str:
        return f"1:1:{self.path}"

    def sync_wal(self) -> None:
        self.disk.sync(self.disk.files[f"{self.path}-wal"])

    def renew_wal(self) -> None:
        wal = self.disk.files[f"{self.path}-wal"]
        self.disk.write(wal, 0, bytes(wal.current))
        self.disk.sync(wal)

    def sync_directory(self) -> None:
        self.disk.operate("sync")
