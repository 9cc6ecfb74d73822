"""
Work in processes of its own: fresh interpreters, each with a pipe to the parent.

A child runs one function ``work(pipe, *arguments)`` and talks in whatever picklable values the two
agree on. If it fails, its traceback is on the terminal and the parent's next `receive` raises.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

ANSWER_TIMEOUT = 300.0
"""Seconds after which a silent child is taken for hung; growth steps take some."""

JOIN_TIMEOUT = 10.0

_context = multiprocessing.get_context("spawn")


class Child:
    """A process that runs ``work(pipe, *arguments)``; leaving the context ends it."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=work, args=(theirs, *arguments), daemon=True)
        self._process.start()
        # Else its end would stay open here, and its death go unnoticed.
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._process.terminate()
        self._process.join(JOIN_TIMEOUT)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def send(self, value: Any) -> None:
        self._pipe.send(value)

    def receive(self) -> Any:
        """Wait for what the child sends next. Raises RuntimeError when it failed or hangs."""
        try:
            if self._pipe.poll(ANSWER_TIMEOUT):
                return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self._process.name} failed") from None
        raise RuntimeError(f"{self._process.name} said nothing for {ANSWER_TIMEOUT} s")


async def told(pipe: Connection) -> Any:
    """In a child with an event loop: wait for what the parent sends next."""
    return await asyncio.to_thread(pipe.recv)
