"""
A session of the OpenAI Agents SDK in a replica: one conversation that many processes and hosts can
continue, online or not. Needs ``crdtstate[openai]``.

    async with CrdtSession.open("team.db", "conversation-7") as session:
        result = await Runner.run(agent, "hello", session=session)

Items of several writers at once all stay, in one order on all replicas: what was added by who had
seen something comes after it. What `add_items`, `pop_item` and `clear_session` return from is
durable. A session belongs to the event loop of its replica: use `Runner.run` or
`Runner.run_streamed`, not `Runner.run_sync`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

from crdtstate.integrations.entries import Entries
from crdtstate.integrations.one_file import OneFile
from crdtstate.replica import Replica

if TYPE_CHECKING:
    from agents.items import TResponseInputItem
    from agents.memory import SessionSettings

DOCUMENT = "openai-sessions"
"""The document that has the sessions, each in a map of its name."""


class CrdtSession:
    """A conversation, as `agents.memory.Session` wants it. Any number of objects, in this process
    or in others, can be of one session.

    Args:
        session_id: Which: 1 to 190 printable characters.
        replica: Where it is: an open replica.
        session_settings: The SDK's; its limit is how many of the newest items are read.
        document: The document that has the sessions.
        saved: Waits until what was written so far is durable; the replica's `durable` if None.

    Raises:
        UnsupportedValue: *session_id* or *document* cannot be a name.
    """

    def __init__(
        self,
        session_id: str,
        replica: Replica,
        *,
        session_settings: SessionSettings | None = None,
        document: str = DOCUMENT,
        saved: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.session_id = session_id
        self.session_settings = session_settings
        self._entries = Entries(replica, document, session_id)
        self._saved = saved or replica.durable

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        path: str | os.PathLike[str],
        session_id: str,
        *,
        name: str = "openai",
        session_settings: SessionSettings | None = None,
        document: str = DOCUMENT,
        **options: Any,
    ) -> AsyncIterator[Self]:
        """The session in a file that any number of processes share; see `OneFile`, which *name*,
        who writes, and the *options* are for."""
        options.setdefault("subscribe", [document])
        async with OneFile(path, name, **options) as one:
            yield cls(
                session_id,
                one.replica,
                session_settings=session_settings,
                document=document,
                saved=one.saved,
            )

    async def get_items(self, limit: int | None = None) -> list[TResponseInputItem]:
        """The newest *limit* items, or as many as the settings say, or all; oldest first."""
        if limit is None and self.session_settings is not None:
            limit = self.session_settings.limit
        keys = self._entries.keys()
        if limit is None:
            return list(self._entries.read(keys))
        found: list[TResponseInputItem] = []
        for item in self._entries.read(keys[::-1]):
            if len(found) >= limit:
                break
            found.append(item)
        return found[::-1]

    async def add_items(self, items: list[TResponseInputItem]) -> None:
        """Add *items* after all that are here: all of them, or on an error none.

        Raises:
            UnsupportedValue: One cannot be written as JSON, or is too long.
            ConfirmTimeout: It is not known whether they are in the file (see `OneFile.saved`).
        """
        if self._entries.add(items):
            await self._saved()

    async def pop_item(self) -> TResponseInputItem | None:
        """Remove the newest item and return it; None if there is none. Two who do so at once, and
        have not heard of each other, get the same one."""
        found: TResponseInputItem | None = None
        for key in reversed(self._entries.keys()):
            found = next(self._entries.read([key]), None)
            self._entries.remove([key])
            if found is not None:
                break
        await self._saved()
        return found

    async def clear_session(self) -> None:
        """Remove all items that are here; what others add at the same time stays."""
        self._entries.remove(self._entries.keys())
        await self._saved()

    def __repr__(self) -> str:
        return f"<CrdtSession {self.session_id}: {len(self._entries)} items>"
