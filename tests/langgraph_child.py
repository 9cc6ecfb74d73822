"""A process that runs a graph on a thread in a file that others have open too, and is killed as
soon as the run has ended: what it was told is stored must be."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Annotated, Any, TypedDict

from langgraph.graph import START, StateGraph

from crdtstate.integrations.langgraph import CrdtChannel, CrdtSaver, increment


class State(TypedDict, total=False):
    """Who was there."""

    notes: Annotated[dict[str, Any], CrdtChannel()]


async def main(path: str, who: str) -> None:
    builder = StateGraph(State)
    builder.add_node("note", lambda state: {"notes": {who: "done", "count": increment()}})
    builder.add_edge(START, "note")
    async with CrdtSaver.open(path, name=who, shared=True) as saver:
        graph = builder.compile(checkpointer=saver)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        await graph.ainvoke({"notes": {}}, {"configurable": {"thread_id": "t"}})
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
