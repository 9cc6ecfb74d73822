"""
Linearizability: could one register, touched by one client at a time, have answered like this?

A history is linearizable if every operation can be given one moment between its call and its
return so that, in the order of these moments, each read returns what was written last (Herlihy &
Wing, "Linearizability", TOPLAS 1990). Their locality theorem lets each key be checked on its own.
Whoever never heard back knows nothing: such a write takes effect at any later time or never, such
a read says nothing.

    history = History()
    write = history.call("agent-0", "write", "leader", "agent-0", now=1.0)
    history.returned(write, None, now=2.0)
    assert (anomaly := check(history.operations())) is None, str(anomaly)

The search is Wing & Gong's ("Testing and verifying concurrent objects", JPDC 1993): place an
operation that may come next, take it back if the rest can't follow. It remembers where it has been
(Lowe, "Testing for linearizability", 2017) and goes key by key (Horn & Kroening, "Faster
linearizability checking via P-compositionality", FORTE 2015). In general that takes exponential
time (Gibbons & Korach, "Testing shared memories", 1997), so it has a bound; see
`_Search._choices` for what a register spares it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal

from crdtstate.errors import CRDTStateError, UsageError

STEPS_MAX = 500_000
"""
Operations placed for one key before the search gives up: ten seconds and 200 MB at worst.

If each value is written once, two thousand operations of ten clients take some two thousand steps;
values that are written again and again are what makes it hard.
"""

VALUE_CHARS = 60


class Undecided(CRDTStateError):
    """The search was longer than its bound; the history may be linearizable or not.

    Attributes:
        key: The key whose operations were being ordered.
        steps: How many operations were placed before the search gave up.
    """

    def __init__(self, key: str, steps: int) -> None:
        super().__init__(
            f"key {key!r}: no verdict after {steps} steps. Raise steps_max, write each value only "
            "once, or let fewer operations overlap."
        )
        self.key = key
        self.steps = steps


# Histories


@dataclass(frozen=True, slots=True)
class Operation:
    """A read or a write of one key, as its client saw it.

    Times are in seconds on one clock. An operation precedes another if it returned strictly
    before that was called; otherwise the two are concurrent.

    Attributes:
        client: Who called; only for the reader.
        kind: ``"read"`` or ``"write"``.
        key: What was read or written.
        value: What was read or written, compared by ``==``; None says that the key is absent.
        called: When it began.
        returned: When it ended; None if it never did or nobody knows how it ended.

    Raises:
        UsageError: It returned before it was called, or at infinity.
    """

    client: str
    kind: Literal["read", "write"]
    key: str
    value: Any
    called: float
    returned: float | None

    def __post_init__(self) -> None:
        if self.returned is not None and not self.called <= self.returned < inf:
            raise UsageError(f"returned before it was called, or never (that is None): {self}")

    def __str__(self) -> str:
        end = "unknown" if self.returned is None else f"{self.returned:.6f}"
        value = repr(self.value)
        if len(value) > VALUE_CHARS:
            value = value[: VALUE_CHARS - 1] + "…"
        did = "read" if self.kind == "read" else "wrote"
        return f"{self.called:13.6f} .. {end:>13} s  {self.client:12} {did} {value}"


class History:
    """Takes down operations as they happen; hand `operations` to `check`.

    What was called and neither returned nor failed has an unknown outcome: say nothing of a call
    that timed out or whose client crashed.
    """

    def __init__(self) -> None:
        self._calls = 0
        # By number, and so in the order of calls. What failed is gone.
        self._operations: dict[int, Operation] = {}

    def call(
        self, client: str, kind: Literal["read", "write"], key: str, value: Any, now: float
    ) -> int:
        """Note that an operation begins.

        Args:
            client: Who calls.
            kind: ``"read"`` or ``"write"``.
            key: What is read or written.
            value: What is written, None to delete; of a read, ignored.
            now: The time, in seconds.

        Returns:
            The operation's number, for `returned` and `failed`.
        """
        number = self._calls
        self._calls += 1
        written = value if kind == "write" else None
        self._operations[number] = Operation(client, kind, key, written, now, None)
        return number

    def returned(self, number: int, value: Any, now: float) -> None:
        """Note that an operation succeeded.

        Args:
            number: What `call` returned.
            value: What was read, None if the key was absent; of a write, ignored.
            now: The time, in seconds.

        Raises:
            UsageError: The operation has ended already, or *now* is before its call.
        """
        operation = self._pending(number)
        result = value if operation.kind == "read" else operation.value
        self._operations[number] = replace(operation, value=result, returned=now)

    def failed(self, number: int) -> None:
        """Forget an operation that certainly had and will have no effect.

        A write that merely timed out has not failed: say nothing of it.

        Raises:
            UsageError: The operation has ended already.
        """
        self._pending(number)
        del self._operations[number]

    def operations(self) -> list[Operation]:
        """Return what was called, in the order of calls, without what failed."""
        return list(self._operations.values())

    def _pending(self, number: int) -> Operation:
        operation = self._operations.get(number)
        if operation is None or operation.returned is not None:
            raise UsageError(f"operation {number} is not pending: it has returned or failed")
        return operation


# Checking


@dataclass(frozen=True, slots=True)
class Anomaly:
    """Operations on one key that no order explains. Its text shows them, a line for each.

    Attributes:
        key: The key.
        initial: What the key held at first.
        core: Operations that contradict each other whatever else happened, in the order of calls.
            Leave out any read of them, or any write that none of them reads, and the contradiction
            is gone; unless the search for the core met its bound, then there may be more.
        total: How many operations on this key the history has.
    """

    key: str
    initial: Any
    core: tuple[Operation, ...]
    total: int

    def __str__(self) -> str:
        head = (
            f"key {self.key!r} is not linearizable: {self.initial!r} at first, no order explains "
            f"these {len(self.core)} of {self.total} operations"
        )
        return "\n".join([head, *map(str, self.core)])


def check(
    operations: Iterable[Operation], *, initial: Any = None, steps_max: int = STEPS_MAX
) -> Anomaly | None:
    """Check that a history of registers, one for each key, is linearizable.

    See the module's docstring for the definition and the sources.

    Args:
        operations: The history, in any order.
        initial: What every key holds at first; None for absent.
        steps_max: How many operations may be placed, for each key, until the search gives up. A
            history that is linearizable takes at least one for each operation. An anomaly's core
            is looked for with as many again.

    Returns:
        None if the history is linearizable, else what contradicts itself on the first key, in the
        order of the history, that is not.

    Raises:
        Undecided: The search took more than *steps_max* steps.
    """
    by_key: dict[str, list[Operation]] = {}
    for operation in operations:
        by_key.setdefault(operation.key, []).append(operation)
    for key, mine in by_key.items():
        numbered = _numbered(mine, initial)
        is_linearizable = _Search(numbered).run(steps_max)
        if is_linearizable is None:
            raise Undecided(key, steps_max)
        if not is_linearizable:
            return Anomaly(key, initial, _core(numbered, steps_max), len(mine))
    return None


_Numbered = tuple[Operation, int]
"""An operation that counts, and the number of its value; 0 is what the key held at first."""


def _numbered(operations: Iterable[Operation], initial: Any) -> list[_Numbered]:
    """Number the values, as they need not be hashable, and leave out reads that say nothing."""
    values = [initial]
    numbered = []
    for operation in operations:
        if operation.kind == "read" and operation.returned is None:
            continue
        if operation.value not in values:
            values.append(operation.value)
        numbered.append((operation, values.index(operation.value)))
    return numbered


class _Search:
    """Looks for an order of the operations on one key that explains every read.

    Calls and returns are kept in one linked list by time. Placing an operation next unlinks both
    of its events and taking it back links them in again where they were (Knuth, "Dancing links",
    2000), so the calls before the first return in the list are always those that may come next.
    """

    def __init__(self, operations: Sequence[_Numbered]) -> None:
        self._is_read = [operation.kind == "read" for operation, _ in operations]
        self._values = [value for _, value in operations]
        # When it must have been placed; never, if nobody knows whether it took effect.
        self._ends = [
            inf if operation.returned is None else operation.returned for operation, _ in operations
        ]
        # What is not placed yet: operations that must be, reads and writes of each value.
        self._due = sum(end < inf for end in self._ends)
        self._readers, self._writers = Counter[int](), Counter[int]()
        for is_read, value in zip(self._is_read, self._values, strict=True):
            (self._readers if is_read else self._writers)[value] += 1
        # What is placed, a bit for each operation, and the value that leaves.
        self._placed = 0
        self._state = 0
        self._link([operation for operation, _ in operations])

    def _link(self, operations: Sequence[Operation]) -> None:
        """Build the list of events: calls before returns at equal times, as these are concurrent.

        Event 0 stands before the first and after the last.
        """
        calls = [(operation.called, False, n) for n, operation in enumerate(operations)]
        returns = [(end, True, n) for n, end in enumerate(self._ends) if end < inf]
        events = sorted(calls + returns)
        self._is_return = [True, *(is_return for _, is_return, _ in events)]
        self._operation = [-1, *(n for _, _, n in events)]
        self._after = [*range(1, len(events) + 1), 0]
        self._before = [len(events), *range(len(events))]
        self._events: list[list[int]] = [[] for _ in operations]
        for event, (_, _, n) in enumerate(events, 1):
            self._events[n].append(event)

    def run(self, steps_max: int) -> bool | None:
        """Return whether there is an order, or None if that took more than *steps_max* steps."""
        self.steps = 0
        # Where the search has been and found, or is about to find, that it can't go on.
        seen: set[tuple[int, int]] = set()
        trail: list[tuple[int, int, list[int]]] = []
        choices = self._choices()
        while self._due:
            if choices:
                if self.steps >= steps_max:
                    return None
                self.steps += 1
                chosen = choices.pop()
                trail.append((chosen, self._state, choices))
                self._place(chosen)
                here = (self._placed, self._state)
                choices = [] if here in seen else self._choices()
                seen.add(here)
            elif trail:
                chosen, state, choices = trail.pop()
                self._take_back(chosen, state)
            else:
                return False
        return True

    def _choices(self) -> list[int]:
        """Return what to try next, the most urgent last.

        Only a register allows these rules. Each leaves out a choice for which, if any order
        follows it, one follows another choice that stays:

        1. A read of what is there comes at once: it changes nothing for the others.
        2. If a read still needs what is there and nobody will write it again, no write may come.
        3. Of several writes of one value the one that returns first comes first; they can swap.
        4. A write that no read needs comes at once: after it comes another write or nothing,
           and here that is so, as no read fits (see 1).
        5. A write of unknown outcome comes right before a read of it, or it needs not come.
        """
        writes: dict[int, int] = {}
        wanted = set()
        event = self._after[0]
        while not self._is_return[event]:
            n = self._operation[event]
            value = self._values[n]
            if self._is_read[n]:
                if value == self._state:
                    return [n]
                wanted.add(value)
            elif value not in writes or self._ends[n] < self._ends[writes[value]]:
                writes[value] = n
            event = self._after[event]
        if self._readers[self._state] and not self._writers[self._state]:
            return []
        for value, n in writes.items():
            if not self._readers[value] and self._ends[n] < inf:
                return [n]
        likely = [n for v, n in writes.items() if self._ends[n] < inf or v in wanted]
        return sorted(likely, key=self._ends.__getitem__, reverse=True)

    def _place(self, n: int) -> None:
        self._placed |= 1 << n
        self._due -= self._ends[n] < inf
        if self._is_read[n]:
            self._readers[self._values[n]] -= 1
        else:
            self._writers[self._values[n]] -= 1
            self._state = self._values[n]
        for event in self._events[n]:
            before, after = self._before[event], self._after[event]
            self._after[before], self._before[after] = after, before

    def _take_back(self, n: int, state: int) -> None:
        for event in reversed(self._events[n]):
            self._after[self._before[event]] = self._before[self._after[event]] = event
        self._placed ^= 1 << n
        self._due += self._ends[n] < inf
        (self._readers if self._is_read[n] else self._writers)[self._values[n]] += 1
        self._state = state


# Explaining


def _core(operations: Sequence[_Numbered], steps_max: int) -> tuple[Operation, ...]:
    """Leave out of a contradiction what it doesn't need.

    Leaving something out must not create a contradiction. So reads go first, then writes that no
    read of the core returns: without those, every order that explained the rest still does. For
    the same reason nothing needs to be tried twice.
    """

    def contradict(kept: Sequence[_Numbered]) -> bool:
        nonlocal steps_max
        search = _Search(kept)
        is_linearizable = search.run(steps_max)
        steps_max -= search.steps
        return is_linearizable is False

    reads = [item for item in operations if item[0].kind == "read"]
    writes = [item for item in operations if item[0].kind == "write"]
    reads = _thinned(reads, lambda kept: contradict([*writes, *kept]))
    values = {value for _, value in reads}
    needed = [item for item in writes if item[1] in values] + reads
    unread = [item for item in writes if item[1] not in values]
    unread = _thinned(unread, lambda kept: contradict([*needed, *kept]))
    return tuple(sorted((operation for operation, _ in needed + unread), key=_by_time))


def _thinned(
    items: list[_Numbered], contradict: Callable[[Sequence[_Numbered]], bool]
) -> list[_Numbered]:
    """Drop items, many at a time at first, as long as the rest is still in contradiction.

    After Zeller & Hildebrandt, "Simplifying and isolating failure-inducing input", 2002.
    """
    size = len(items)
    while size:
        start = 0
        while start < len(items):
            rest = items[:start] + items[start + size :]
            if contradict(rest):
                items = rest
            else:
                start += size
        size //= 2
    return items


def _by_time(operation: Operation) -> tuple[float, float]:
    return operation.called, inf if operation.returned is None else operation.returned
