"""
A channel in which parallel nodes write one key, and all of it is kept.

    class State(TypedDict):
        plan: Annotated[dict, CrdtChannel()]

A node returns the keys that it sets, ``{"plan": {"goal": "ship it"}}``, or all that it read with
its changes in it. What several nodes, or runs, did at the same time is merged, key by key:

    a dict      merges, to any depth; keys that are left out stay
    a list      is what the node wants it to be: what it added, removed or left out is done to the
                list as it is by then, so what others appended stays
    a set       likewise, element by element
    anything    the last write wins, the same one everywhere
    DELETE      removes the key; what somebody writes to it later is there again
    increment() adds to a number; all increments count
    Overwrite   of LangGraph, in place of the dict: replaces all there is

Values are plain: None, bool, int, float, str, bytes, aware datetimes, and lists, sets and dicts of
those; messages and models go in as ``.model_dump()``. A checkpoint holds the state as bytes, which
`CrdtSaver` merges where runs forked; any other saver keeps them as they are.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from langgraph.channels.base import BaseChannel
from langgraph.errors import EmptyChannelError

from crdtstate.errors import UsageError
from crdtstate.integrations.langgraph.merging import State, is_state


def wall_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class CrdtChannel(BaseChannel[dict[Any, Any], dict[Any, Any], bytes]):
    """A dict that merges: ``Annotated[dict, CrdtChannel()]``.

    Args:
        typ: What it holds; a dict.
        now_ms: Returns milliseconds since 1970, by which the last of several writes is found.
    """

    __slots__ = ("_actor", "_now_ms", "_state")

    def __init__(self, typ: Any = dict, *, now_ms: Callable[[], int] = wall_ms) -> None:
        super().__init__(typ)
        self._now_ms = now_ms
        self._state: State | None = None
        # Nobody else may ever write as the same one: each copy draws its own.
        self._actor: int | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CrdtChannel)

    def __hash__(self) -> int:
        return hash(CrdtChannel)

    @property
    def ValueType(self) -> Any:
        """What nodes read."""
        return self.typ

    @property
    def UpdateType(self) -> Any:
        """What nodes return."""
        return self.typ

    def get(self) -> dict[Any, Any]:
        """What it holds, made anew. Nodes should leave it as it is, and return something new:
        LangGraph hands the same objects to all nodes of a step."""
        if self._state is None:
            raise EmptyChannelError()
        return self._state.value()

    def is_available(self) -> bool:
        """Whether anything was ever written."""
        return self._state is not None

    def update(self, values: Sequence[Any]) -> bool:
        """Take in what nodes returned, all of them made from the present value.

        Raises:
            UsageError, UnsupportedValue: One of them cannot be taken; nothing changed.
        """
        if not values:
            return False
        if self._actor is None:
            self._actor = secrets.randbits(48)
        state = self._state or State()
        self._state = state.updated(values, self._now_ms(), self._actor)
        return True

    def checkpoint(self) -> Any:
        """The state as bytes; if there is none, what LangGraph takes for nothing."""
        return super().checkpoint() if self._state is None else self._state.encode()

    def from_checkpoint(self, checkpoint: Any) -> Self:
        """A channel with the state of a checkpoint. A dict, from before the key was a CrdtChannel,
        is taken over.

        Raises:
            InvalidUpdate: The bytes are no state.
            UsageError: It is neither.
        """
        made = self.copy()
        made._state = None
        if is_state(checkpoint):
            made._state = State.decode(checkpoint)
        elif isinstance(checkpoint, dict):
            # As if it had been written before everything else, and the same wherever that is done.
            made._state = State().updated([checkpoint], 0, 0)
        elif checkpoint is not None and checkpoint is not made.checkpoint():
            raise UsageError(
                f"a CrdtChannel goes on from its own checkpoint or a dict, not from "
                f"{type(checkpoint).__name__}"
            )
        return made

    def copy(self) -> Self:
        """A channel of its own with the same state."""
        made = self.__class__(self.typ, now_ms=self._now_ms)
        made.key, made._state = self.key, self._state
        return made
