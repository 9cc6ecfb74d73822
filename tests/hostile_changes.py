"""
Hostile changes against whole documents, in a process that may die of it.

Each trial makes an honest history, alters the Yjs update, the slots in it or the fields around
it, gives the result a good checksum, and hands it to a document that is ready for it: what a
member with write access could do. Whatever is taken in, the document must then read, write, be
saved and loaded.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from typing import Any

import msgpack
from harness import Agent, contents
from hostile import mutated, plausible, report, section, slot, update, wild

from crdtstate.change import Change, Snapshot, decode_change, encode_change
from crdtstate.clock import Dot
from crdtstate.errors import CRDTStateError, InvalidUpdate
from crdtstate.guard import parse_change
from crdtstate.slots import Slot
from crdtstate.values import pack

PATHS = ["mplan\0goal", "mplan\0k1", "cn\0", "sskills\0spython", "rleader\0", "@strategies\0mplan"]


def history(rng: random.Random) -> tuple[Agent, Agent, list[Change]]:
    """A writer, a victim that has heard of all but its last changes, and these changes."""
    writer, victim = Agent(7), Agent(9)
    for _ in range(rng.randrange(1, 12)):
        act(writer, rng)
        act(victim, rng)
        victim.sealed()
        for change in writer.sealed():
            victim.receive(change)
        if rng.random() < 0.3:
            for change in victim.outbox:
                writer.receive(change)
    last: list[Change] = []
    for _ in range(rng.randrange(1, 4)):
        act(writer, rng)
        last += writer.sealed()
    return writer, victim, last


def act(agent: Agent, rng: random.Random) -> None:
    with agent.transaction():
        for _ in range(rng.randrange(1, 4)):
            match rng.randrange(6):
                case 0 | 1:
                    agent.map("plan")[rng.choice(["goal", "k1", "k2"])] = rng.random()
                case 2:
                    agent.map("plan").pop("goal", None)
                case 3:
                    agent.counter("n").increment(rng.randrange(1, 9))
                case 4:
                    agent.set("skills").add(rng.choice(["python", 3]))
                case 5:
                    agent.register("leader").value = [1, {"a": b"x"}]


def hostile_slot(rng: random.Random) -> bytes:
    """A slot as somebody would forge it, or bytes that are none."""
    covers = {rng.choice([7, 9, 11]): rng.randrange(1, 30) for _ in range(rng.randrange(3))}
    value = rng.choice(
        [
            None,
            pack(1, ""),
            pack([2, 3], ""),
            pack("lww", ""),
            b"",
            b"\xc1",
            b"\x9f",
            rng.randbytes(5),
        ]
    )
    made = Slot(value, rng.randrange(1, 20), rng.getrandbits(62), covers).encode()
    if rng.random() < 0.3:
        return mutated(made, [made], rng)
    if rng.random() < 0.1:
        return bytes(msgpack.packb(rng.choice([[], {}, 7, [None] * 6, [[[[]]]]])))
    return made


def forged(change: Change, victim: Agent, rng: random.Random) -> bytes:
    """A change like *change*, but not as its writer made it."""
    lane = victim.document("main").lanes.lane(change.writer)
    match rng.randrange(6):
        case 0:
            data = mutated(change.update, [change.update, rng.randbytes(40)], rng)
        case 1:
            data = plausible(change.writer, lane.clock, rng)
        case 2:
            data = wild(change.writer, lane.clock, rng)
        case 3:
            segments = list(lane.segments) or [0]
            structs = [
                slot(hostile_slot(rng), 7, parent=rng.choice(segments), key=rng.choice(PATHS))
                for _ in range(rng.choice([1, 1, 2]))
            ]
            tails = list(lane.items) or [0]
            dead = sorted({rng.choice(tails) for _ in range(rng.randrange(2))})
            data = update(
                section(7, lane.clock, *structs),
                deletes={7: [(at, 1) for at in dead]} if dead else {},
            )
        case 4:
            parsed = parse_change(change.update)
            data = change.update
            for *_, content in parsed.items:
                if content is not None and rng.random() < 0.7:
                    worse = hostile_slot(rng)
                    if len(worse) == len(content):
                        data = data.replace(content, worse)
                    else:
                        data = data.replace(
                            bytes([len(content)]) + content, bytes([len(worse)]) + worse
                        )
        case _:
            data = change.update
    due = victim.document("main").version.get(7, 0) + 1
    deps = dict(change.deps)
    if rng.random() < 0.1:
        deps[rng.choice([9, 11])] = rng.randrange(1, 5)
    dot = Dot(rng.choice([7] * 20 + [9, 11]), rng.choice([due] * 20 + [change.seq, due + 1]))
    made = encode_change(
        "main",
        dot,
        {writer: seq for writer, seq in deps.items() if writer != 7},
        rng.choice([change.stamp, 0, 2**62]),
        rng.choice([change.kind, 3]),
        False,
        data,
        change.origin,
        # Or it would be refused before anybody looks at what it says.
        prev=victim.document("main").ids.get(dot.writer, bytes(16)) if dot.seq > 1 else b"",
    )
    return made.data


def use(victim: Agent) -> None:
    """Everything that a document is there for."""
    document = victim.document("main")
    plan = victim.map("plan")
    read: list[Any] = [victim.counter("n").value, set(victim.set("skills")), victim.conflicts()]
    try:
        read += [dict(plan), victim.register("leader").value, plan.explain("goal")]
    except CRDTStateError:
        assert plan.strategy not in ("lww", "max", "min", "merge")
    snapshot = Snapshot.decode(document.snapshot().encode())
    again = Agent(11)
    again.find_or_make("main", False).join(snapshot)
    assert contents(again)["main"] == contents(victim)["main"]
    plan["after"] = 1
    victim.counter("n").increment()
    for change in victim.sealed():
        again.receive(change)
    assert contents(again)["main"] == contents(victim)["main"]


def main(_: str, seed: int, count: int) -> None:
    rng = random.Random(seed)
    fates: Counter[str] = Counter()
    while fates.total() < count:
        _writer, victim, last = history(rng)
        use(victim)
        for change in last:
            for _ in range(8):
                data = forged(change, victim, rng)
                report(data)
                before = contents(victim)
                try:
                    hostile = decode_change(data)
                    document = victim.document("main")
                    if (
                        not document.is_ready(hostile)
                        or hostile.writer == victim.document("main").writer
                    ):
                        fates["not ready"] += 1
                        continue
                    document.apply(hostile)
                except InvalidUpdate:
                    assert contents(victim) == before, "a refused change left a trace"
                    fates["refused"] += 1
                    continue
                fates["accepted"] += 1
                use(victim)
    print(json.dumps(fates), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
