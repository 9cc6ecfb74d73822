"""
Validators: functions that say which changes a document admits.

A validator is registered in every process under a name; which names hold for a document, and from
when on, is replicated in the document itself (`rules`). It is given a `Proposal`, which says what
a change writes, who made it and why, and what its writer had said at each place before; and it
returns None or True to admit it, or False or a reason to refuse it.

    @crdtstate.validator("whole tasks")
    def whole_tasks(proposal):
        for write in proposal.writes:
            if write.name == "tasks" and write.value is not None and "title" not in write.value:
                return f"{write.path} has no title"

It must be a pure function: of the proposal, and of nothing else. No clock, no chance, no file, no
other document, and not even what the document reads as, because on each replica that is something
else when the change arrives. Then all replicas come to the same answer, whatever arrives first.
One that raises refuses. What a name means must not change: give a stricter one another name, and
let the document use that, which also says from when on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from crdtstate.errors import UnknownValidator, UsageError
from crdtstate.values import unpack

KINDS = {"m": "map", "c": "counter", "r": "register", "s": "set", "@": "strategy"}


@dataclass(frozen=True, slots=True)
class Write:
    """What a change writes at one place.

    Attributes:
        kind: ``"map"``, ``"counter"``, ``"register"``, ``"set"``, or ``"strategy"`` (which rule
            decides conflicts; *name* is then ``"strategies"``).
        name: The view's name.
        key: The map's key, or the set's element; None where there is one value.
        size: Its bytes: those of name, key and packed value.
        packed: The value as bytes, or None for a removal.
        packed_before: The same of what its writer had said there before.
    """

    kind: str
    name: str
    key: Any
    size: int
    packed: bytes | None
    packed_before: bytes | None

    @property
    def value(self) -> Any:
        """What is written, None also for a removal; of a counter, by how much it counts."""
        return None if self.packed is None else unpack(self.packed)

    @property
    def before(self) -> Any:
        """What the *same writer* had said there before, None also for nothing: not what anybody
        reads there. Of a counter, all that it had counted."""
        return None if self.packed_before is None else unpack(self.packed_before)

    @property
    def removed(self) -> bool:
        """Whether it is a removal."""
        return self.packed is None

    @property
    def path(self) -> str:
        """The place as text, such as ``plan['goal']``."""
        return self.name if self.key is None else f"{self.name}[{self.key!r}]"


@dataclass(frozen=True, slots=True)
class Proposal:
    """A change that is to be admitted or refused. All of it is in the change, or follows from its
    writer's earlier ones, so it is the same on every replica.

    Attributes:
        document: The document's name.
        agent: Who made it,
        writer: as which writer,
        message: why,
        run: and in which run, in their words.
        kind: ``"write"``, or ``"resolution"`` of a conflict.
        writes: What it writes, by place.
    """

    document: str
    agent: str
    writer: int
    message: str
    run: str
    kind: str
    writes: tuple[Write, ...]

    @property
    def size(self) -> int:
        """The bytes of all that it writes."""
        return sum(write.size for write in self.writes)


Validator = Callable[[Proposal], str | bool | None]
"""Admits a proposal (None, True) or refuses it (False, or the reason)."""

_registry: dict[str, Validator] = {}


def validator(name: str) -> Callable[[Validator], Validator]:
    """Register the decorated function as the validator *name*, in this process.

    Register it under the same name in every process that takes part in a document that uses it,
    relays included, before they open it.

    Raises:
        UsageError: The name cannot be one, or is taken by a different function. The same one,
            defined anew, takes its place.
    """
    if not isinstance(name, str) or not 0 < len(name) <= 100 or not name.isprintable():
        raise UsageError(f'use it as @validator("name"), 1 to 100 characters, not {name!r}')

    def register(function: Validator) -> Validator:
        if not callable(function):
            raise UsageError(f"a validator is a function of a proposal, not {function!r}")
        if name in _registry and _place(_registry[name]) != _place(function):
            raise UsageError(f"the validator {name!r} is taken by {_place(_registry[name])}")
        _registry[name] = function
        return function

    return register


def _place(function: Validator) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"


def known_validators() -> list[str]:
    """The names that can be given to `Document.use_validator` in this process."""
    return sorted(_registry)


def is_known(name: str) -> bool:
    """Whether a validator is registered here."""
    return name in _registry


def ask(name: str, proposal: Proposal) -> str | None:
    """Why the validator *name* refuses *proposal*; None if it admits it.

    Raises:
        UnknownValidator: It is not registered here, so nobody can tell.
    """
    function = _registry.get(name)
    if function is None:
        raise UnknownValidator(name, proposal.document, known_validators())
    try:
        answer = function(proposal)
    except MemoryError:
        raise
    except Exception as exc:
        return f"{name}: it failed: {type(exc).__name__}"
    if answer is None or answer is True:
        return None
    return f"{name}: {answer}" if isinstance(answer, str) and answer else name
