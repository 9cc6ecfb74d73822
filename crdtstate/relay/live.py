"""
The stream behind the status page: what it shows, again and again, as far as it changed.

A text is a JSON object with the *sections* of the page that are new to this viewer; the first one
has them all. Sections are made and encoded once for all viewers, at most twice a second, and only
while somebody watches. Each viewer asks for the next text when it has taken the one before, so one
that is slow sees less and holds nothing up.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple

VIEWERS_MAX = 32
"""More are turned away, and try again."""

EVERY = 0.5
"""Seconds between two texts, and the age at which sections are made anew."""

SILENCE_MAX = 5.0
"""After so many seconds without news an empty text says that the relay is still there; the page
gives it up after three times as long."""


class _Section(NamedTuple):
    text: str
    number: int


class Live:
    """The sections as they were made last, and who watches.

    Args:
        sections: Makes all sections, by name.
    """

    def __init__(self, sections: Callable[[], dict[str, Any]]) -> None:
        self.viewers = 0
        self._make = sections
        self._made_at = float("-inf")
        # Rises with every section that changed.
        self._number = 0
        self._sections: dict[str, _Section] = {}

    async def texts(self) -> AsyncGenerator[str, None]:
        """The texts for one viewer; none if there are too many."""
        if self.viewers >= VIEWERS_MAX:
            return
        self.viewers += 1
        try:
            seen, told_at = 0, float("-inf")
            while True:
                self._refresh()
                now = time.monotonic()
                if self._number > seen or now - told_at >= SILENCE_MAX:
                    text, seen, told_at = self._news(seen), self._number, now
                    yield text
                await asyncio.sleep(EVERY)
        finally:
            self.viewers -= 1

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._made_at < EVERY:
            return
        self._made_at = now
        for name, content in self._make().items():
            text = json.dumps(content, separators=(",", ":"))
            if name not in self._sections or self._sections[name].text != text:
                self._number += 1
                self._sections[name] = _Section(text, self._number)

    def _news(self, seen: int) -> str:
        news = (
            f'"{name}":{section.text}'
            for name, section in self._sections.items()
            if section.number > seen
        )
        return "{" + ",".join(news) + "}"
