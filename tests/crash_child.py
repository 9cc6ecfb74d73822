"""
An agent that pycrdt kills: run as a program, it opens a store and applies what it gets, and a
change or state with the word DEADLY ends the process with SIGSEGV, as a bug in pycrdt would.

    python tests/crash_child.py STORE PEER deadly|harmless until NAME=VALUE ...

It ends in order once the map "plan" holds what is named, and prints what it has as JSON.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import sys
from typing import Any

from crdtstate import Changed, Config, Replica
from crdtstate.lanes import Lanes

FAST = Config(heartbeat=0.2, link_timeout=2.0, want_delay=0.05, want_retry=0.1)


def make_deadly() -> None:
    apply = Lanes.apply

    def apply_or_die(self: Lanes, update: bytes, plan: Any) -> list[str]:
        if b"DEADLY" in update:
            ctypes.string_at(0)
        return apply(self, update, plan)

    Lanes.apply = apply_or_die  # type: ignore[method-assign]


async def main(store: str, peer: str, wanted: dict[str, str]) -> None:
    peers = [peer] if peer else []
    async with Replica("victim", store=store, peers=peers, config=FAST) as replica:
        plan, changed = replica.map("plan"), asyncio.Event()
        replica.on(Changed, lambda event: changed.set())
        while not wanted.items() <= dict(plan).items():
            await changed.wait()
            changed.clear()
        await replica.durable()
        aside = [[each.document, *each.dot] for each in replica.quarantined()]
        recovery = replica.recovery
        source = None if recovery is None else recovery.source
        print(json.dumps({"plan": dict(plan), "aside": aside, "source": source}))


if __name__ == "__main__":
    store, peer, how, _, *pairs = sys.argv[1:]
    if how == "deadly":
        make_deadly()
    asyncio.run(main(store, peer, dict(pair.split("=", 1) for pair in pairs)))
