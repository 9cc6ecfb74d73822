"""
A model of lanes: documents that write, drop, clean, delay, snapshot, restart and go on as other
writers at random, compared step by step with a reference multi-value store that keeps dots and
knows nothing of lanes.

The reference of a replica is ``{path: {dot: value}}`` and a version. A write replaces the dots that
its replica sees; two references join as dot stores do (Almeida et al., "Delta state replicated
data types", 2018): what only one side has is kept if the other side has not seen it.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

from crdtstate.change import Change, decode_change
from crdtstate.clock import Dot, HybridClock
from crdtstate.document import Document
from crdtstate.slots import candidates
from crdtstate.values import pack, unpack

CONTAINER = "mplan"
KEYS = ("a", "b", "c")

Ops = list[tuple[str, frozenset[Dot], Dot | None, Any]]
"""What a change does to the reference: (key, replaced dots, new dot, value)."""


class Model:
    """One replica: a document, its reference, and what has arrived but is not delivered."""

    def __init__(self, writer: int, ticks: Any) -> None:
        self.ticks = ticks
        self.writer = writer
        self.document = self._make()
        self.dots: dict[str, dict[Dot, Any]] = {key: {} for key in KEYS}
        self.inbox: list[tuple[Change, Ops]] = []
        # Increments of this writer to the counter.
        self.counted = 0

    def _make(self) -> Document:
        return Document(
            "model",
            writer=self.writer,
            agent=f"agent-{self.writer}",
            clock=HybridClock(),
            wall=lambda: next(self.ticks),
            on_write=lambda document: None,
        )

    def succeed(self, writer: int) -> None:
        """Go on as *writer*, and adopt what was written before (L6)."""
        old, self.writer = self.document, writer
        self.document = self._make()
        self.document.join(old.snapshot())
        for former in old.lanes.tended:
            self.document.adopt(former)
        old.close()

    def write(self, rng: random.Random, value: str) -> Ops:
        """Write or remove at one to three keys; what is written again replaces itself."""
        dot = Dot(self.writer, self.document.version.get(self.writer, 0) + 1)
        ops: Ops = []
        for key in rng.sample(KEYS, rng.choice((1, 1, 2, 3))):
            removed = rng.random() < 0.25
            if removed and not self.dots[key]:
                continue
            self.document.put(CONTAINER, key, None if removed else pack(value, "model"))
            op = (key, frozenset(self.dots[key]), None if removed else dot, value)
            self.apply_ops([op])
            ops.append(op)
        if rng.random() < 0.2:
            self.document.count("cn", 3, 1)
            self.counted += 2
        return ops

    def apply_ops(self, ops: Ops) -> None:
        for key, replaced, dot, value in ops:
            for old in replaced:
                self.dots[key].pop(old, None)
            if dot is not None:
                self.dots[key][dot] = value

    def deliver(self) -> None:
        progress = True
        while progress:
            progress = False
            for item in list(self.inbox):
                change, ops = item
                if self.document.version.covers(change.dot):
                    self.inbox.remove(item)
                elif self.document.is_ready(change):
                    self.inbox.remove(item)
                    self.document.apply(decode_change(change.data))
                    self.apply_ops(ops)
                    progress = True

    def join(self, other: Model) -> None:
        """Take a snapshot of *other*, which has nothing unsealed."""
        snapshot = other.document.snapshot()
        mine = self.document.version.copy()
        for key in KEYS:
            ours, theirs = self.dots[key], other.dots[key]
            self.dots[key] = {
                dot: value
                for dot, value in (ours | theirs).items()
                if (dot in ours and dot in theirs)
                or (dot in ours and not snapshot.version.covers(dot))
                or (dot in theirs and not mine.covers(dot))
            }
        self.document.join(snapshot)

    def live(self, key: str) -> dict[Dot, Any]:
        """What the lanes say is live at *key*, by the dot it was written under."""
        cell = self.document.lanes.container(CONTAINER).cells.get(key, {})
        return {
            Dot(writer, slot.seq): unpack(slot.value or b"") for writer, slot in candidates(cell)
        }

    def check(self, where: object) -> None:
        for key in KEYS:
            assert self.live(key) == self.dots[key], (where, key, self.live(key), self.dots[key])

    def slots(self) -> int:
        cells = self.document.lanes.container(CONTAINER).cells
        return sum(len(cell) for cell in cells.values())


def run(seed: int, replicas: int = 4, steps: int = 90) -> None:
    """One random history. Raises AssertionError, with the place, where model and lanes differ."""
    rng = random.Random(seed)
    ticks = itertools.count(1)
    writers = itertools.count(1)
    models = [Model(next(writers), ticks) for _ in range(replicas)]
    network: list[tuple[Model, Change, Ops]] = []
    values = (f"value-{number}" for number in itertools.count())

    def seal(model: Model, ops: Ops) -> None:
        change = model.document.seal()
        if change is not None:
            network.extend((other, change, ops) for other in models if other is not model)

    def pass_on(count: int) -> None:
        for _ in range(min(count, len(network))):
            other, change, ops = network.pop(rng.randrange(len(network)))
            other.inbox.append((change, ops))
            other.deliver()

    for step in range(steps):
        model = rng.choice(models)
        roll = rng.random()
        if roll < 0.6:
            seal(model, model.write(rng, next(values)))
        elif roll < 0.8:
            seal(model, [])
        elif roll < 0.84:
            model.join(rng.choice(models))
            model.deliver()
        elif roll < 0.88:
            # A restart: the document comes back from its own snapshot.
            model.document.join(model.document.snapshot())
            model.document.lanes.load(model.document.engine.state(), model.document.version)
        elif roll < 0.9:
            model.succeed(next(writers))
        pass_on(rng.randrange(6))
        model.check((seed, step))
        if step % 10 == 0:
            for each in models:
                each.check((seed, step))
    for _ in range(5):
        pass_on(len(network))
        for model in models:
            seal(model, [])
    pass_on(len(network))
    first = models[0]
    for model in models:
        model.check((seed, "end"))
        same = model.document.lanes.canonical() == first.document.lanes.canonical()
        assert same, (seed, "canonical content differs at equal versions")
        assert model.document.version == first.document.version, (seed, "versions differ")
        total = model.document.counter("n").value
        assert total == sum(m.counted for m in models), (seed, "counter", total)
        left = model.slots() - sum(len(model.dots[key]) for key in KEYS)
        assert left == 0, (seed, "slots left over", left)
        model.document.close()
