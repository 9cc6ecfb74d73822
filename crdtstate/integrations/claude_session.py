"""
The sessions of the Claude Agent SDK in a replica: transcripts that any process or host can list
and resume. Needs ``crdtstate[claude]``.

    async with CrdtSessionStore.open("team.db") as store:
        options = ClaudeAgentOptions(session_store=store)

Entries of one session that several processes append at once all stay, in one order on all
replicas. What `append` and `delete` return from is durable. The `uuid` of an entry names it:
whoever appends it again, at once or later, adds nothing that is read.

A summary is a fold over the entries in that order, as the SDK makes it, so nobody has to wait for
anybody: each writer keeps, under its own key, what it folded, up to which entry and over how many.
Whoever reads takes one of these that still holds, and folds what has come since.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

from crdtstate.errors import UsageError
from crdtstate.integrations.entries import Entries, stamp_of
from crdtstate.integrations.one_file import OneFile
from crdtstate.replica import Replica

try:
    from claude_agent_sdk import fold_session_summary
except ImportError as exc:
    hint = "CrdtSessionStore needs claude-agent-sdk: pip install 'crdtstate[claude]'"
    raise ImportError(hint) from exc

if TYPE_CHECKING:
    from claude_agent_sdk.types import (
        SessionKey,
        SessionListSubkeysKey,
        SessionStoreEntry,
        SessionStoreListEntry,
        SessionSummaryEntry,
    )

DOCUMENT = "claude-sessions"
"""The document that has all sessions."""


class CrdtSessionStore:
    """Transcripts of sessions, as `claude_agent_sdk.SessionStore` wants them.

    Args:
        replica: Where they are: an open replica.
        document: The document that has them.
        saved: Waits until what was written so far is durable; the replica's `durable` if None.
    """

    def __init__(
        self,
        replica: Replica,
        *,
        document: str = DOCUMENT,
        saved: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._replica = replica
        self._document = document
        self._saved = saved or replica.durable

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        path: str | os.PathLike[str],
        *,
        name: str = "claude",
        document: str = DOCUMENT,
        **options: Any,
    ) -> AsyncIterator[Self]:
        """The sessions in a file that any number of processes share; see `OneFile`, which *name*,
        who writes, and the *options* are for."""
        options.setdefault("subscribe", [document])
        async with OneFile(path, name, **options) as one:
            yield cls(one.replica, document=document, saved=one.saved)

    async def append(self, key: SessionKey, entries: list[SessionStoreEntry]) -> None:
        """Add *entries* to a transcript, without those whose `uuid` it has.

        Raises:
            UsageError, UnsupportedValue: The key, or an entry, cannot be; nothing changed.
            ConfirmTimeout: It is not known whether they are in the file (see `OneFile.saved`).
        """
        transcript = self._transcript(key)
        new = transcript.unknown(entries)
        if new:
            mark = transcript.add(new)
            transcript.marks[f"{self._replica.writer:x}"] = json.dumps(mark)
            self._listed(key["project_key"]).add(_name(transcript.session_id, transcript.subpath))
        if entries:
            await self._saved()

    async def load(self, key: SessionKey) -> list[SessionStoreEntry] | None:
        """All entries of a transcript, in order; None if there are none."""
        transcript = self._transcript(key)
        keys = transcript.entries.keys()
        return list(transcript.read(keys)) if keys else None

    async def list_sessions(self, project_key: str) -> list[SessionStoreListEntry]:
        """The sessions of a project, and when each was written last, in milliseconds."""
        return [
            {"session_id": each.session_id, "mtime": each.mtime}
            for each in self._transcripts(project_key)
            if each.subpath is None
        ]

    async def list_session_summaries(self, project_key: str) -> list[SessionSummaryEntry]:
        """The summaries of the sessions of a project."""
        found: list[SessionSummaryEntry] = []
        for each in self._transcripts(project_key):
            if each.subpath is None:
                data = each.fold(each.entries.keys()).data
                found.append({"session_id": each.session_id, "mtime": each.mtime, "data": data})
        return found

    async def delete(self, key: SessionKey) -> None:
        """Remove what is here of a transcript; of a session's main one, with all its subpaths.
        What others append at the same time stays."""
        wanted = self._transcript(key)
        listed = self._listed(key["project_key"])
        for each in list(self._transcripts(key["project_key"])):
            if each.session_id == wanted.session_id and wanted.subpath in (None, each.subpath):
                each.clear()
                listed.discard(_name(each.session_id, each.subpath))
        await self._saved()

    async def list_subkeys(self, key: SessionListSubkeysKey) -> list[str]:
        """The subpaths of a session."""
        return [
            each.subpath
            for each in self._transcripts(key["project_key"])
            if each.session_id == key["session_id"] and each.subpath is not None
        ]

    def _listed(self, project_key: str) -> Any:
        """The set of a project's transcripts."""
        return self._replica.document(self._document).set(f"project/{_digest(project_key)}")

    def _transcripts(self, project_key: str) -> Iterator[_Transcript]:
        for name in sorted(map(str, self._listed(project_key))):
            match _parse(name):
                case [str(session_id)]:
                    yield self._of(project_key, session_id, None)
                case [str(session_id), str(subpath)]:
                    yield self._of(project_key, session_id, subpath)

    def _transcript(self, key: SessionKey) -> _Transcript:
        if not all(isinstance(part, str) and part for part in key.values()):
            raise UsageError(f"a session's key has texts that are not empty, not {key!r}")
        return self._of(key["project_key"], key["session_id"], key.get("subpath"))

    def _of(self, project_key: str, session_id: str, subpath: str | None) -> _Transcript:
        return _Transcript(self._replica, self._document, project_key, session_id, subpath)

    def __repr__(self) -> str:
        return f"<CrdtSessionStore {self._document} of {self._replica.agent}>"


class _Mark(NamedTuple):
    """What a writer folded, and when it wrote last.

    Attributes:
        mtime: In milliseconds.
        through: The key of the last entry.
        entries: How many entries there were up to that one,
        digest: and which, as a digest of their keys.
        uuids: How many uuids these had.
        data: What they come to; of a subpath nothing.
    """

    mtime: int
    through: str
    entries: int
    digest: str
    uuids: int
    data: dict[str, Any]

    def holds(self, keys: list[str]) -> bool:
        """Whether it was made of exactly those of *keys* up to its last: nothing has come in
        between, and nothing is gone."""
        count = bisect_right(keys, self.through)
        return count == self.entries and _digest(*keys[:count]) == self.digest


_NONE = _Mark(0, "", 0, hashlib.blake2b(digest_size=16).hexdigest(), 0, {})


class _Transcript:
    """One transcript: its entries, the uuids they have, and who folded how far."""

    def __init__(
        self, replica: Replica, document: str, project: str, session_id: str, subpath: str | None
    ) -> None:
        self.session_id, self.subpath = session_id, subpath
        self._key = cast("SessionKey", {"project_key": project, "session_id": session_id})
        label = "".join(each for each in session_id if each.isprintable())[:40]
        name = f"{label} {_digest(json.dumps([project, session_id, subpath]))}"
        self.entries = Entries(replica, document, name)
        self.uuids = replica.document(document).set(f"uuids/{name}")
        self.marks = replica.document(document).map(f"marks/{name}")

    @property
    def mtime(self) -> int:
        return max((mark.mtime for mark in self._marks()), default=0)

    def unknown(self, entries: Iterable[SessionStoreEntry]) -> list[SessionStoreEntry]:
        """Those of *entries* that are not here."""
        return [each for each in _once(entries) if _uuid(each) not in self.uuids]

    def add(self, entries: list[SessionStoreEntry]) -> _Mark:
        """Add *entries*, none of which are here; returns what all comes to."""
        keys = self.entries.keys()
        mark = _NONE if self.subpath is not None else self.fold(keys)
        keys += self.entries.add(entries)
        uuids = _uuids(entries)
        self.uuids.update(uuids)
        mtime = stamp_of(keys[-1]).wall_ms
        if self.subpath is not None:
            return _NONE._replace(mtime=mtime)
        data = self._fold(mark.data, entries)
        return _Mark(mtime, keys[-1], len(keys), _digest(*keys), mark.uuids + len(uuids), data)

    def read(self, keys: list[str]) -> Iterator[SessionStoreEntry]:
        """The entries at *keys*; of those with one uuid, which were appended at once, the first."""
        return _once(self.entries.read(keys))

    def fold(self, keys: list[str]) -> _Mark:
        """What the entries at *keys*, which are all that are here, come to."""
        marks = sorted(self._marks(), key=lambda mark: mark.entries, reverse=True)
        best = next((mark for mark in marks if mark.holds(keys)), _NONE)
        rest = list(self.read(keys[best.entries :]))
        if best.uuids + len(_uuids(rest)) != len(self.uuids):
            # Some of the rest is there twice.
            best, rest = _NONE, list(self.read(keys))
        data = self._fold(best.data, rest)
        return best._replace(uuids=len(self.uuids), data=data)

    def _fold(self, data: dict[str, Any], entries: list[SessionStoreEntry]) -> dict[str, Any]:
        start: SessionSummaryEntry = {"session_id": self.session_id, "mtime": 0, "data": data}
        return fold_session_summary(start, self._key, entries)["data"]

    def clear(self) -> None:
        self.entries.remove(self.entries.keys())
        for uuid in self.uuids:
            self.uuids.discard(uuid)
        for writer in self.marks:
            del self.marks[writer]

    def _marks(self) -> Iterator[_Mark]:
        for text in self.marks.values():
            match _parse(text):
                case [int(mtime), str(last), int(count), str(digest), int(uuids), dict(data)]:
                    yield _Mark(mtime, last, count, digest, uuids, data)


def _uuid(entry: Any) -> str | None:
    uuid = entry.get("uuid") if isinstance(entry, dict) else None
    return uuid if isinstance(uuid, str) else None


def _uuids(entries: Iterable[SessionStoreEntry]) -> set[str]:
    return {uuid for entry in entries if (uuid := _uuid(entry)) is not None}


def _once(entries: Iterable[SessionStoreEntry]) -> Iterator[SessionStoreEntry]:
    """Those of *entries* whose uuid was not there before."""
    seen: set[str] = set()
    for entry in entries:
        uuid = _uuid(entry)
        if uuid is None or uuid not in seen:
            yield entry
        if uuid is not None:
            seen.add(uuid)


def _parse(text: object) -> Any:
    """What JSON says; None if it is none."""
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def _name(session_id: str, subpath: str | None) -> str:
    return json.dumps([session_id] if subpath is None else [session_id, subpath])


def _digest(*parts: str) -> str:
    """A text of fixed length for texts of any."""
    joined = "\0".join(parts).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(joined, digest_size=16).hexdigest()
