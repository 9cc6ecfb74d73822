"""
LangGraph on crdtstate: parallel nodes and runs at once write one key, and all of it is kept.

With LangGraph's own parts the two researchers below would raise InvalidUpdateError, and of the two
runs at once only the later one would be left. Needs `pip install 'crdtstate[langgraph]'`.
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated, TypedDict

from langgraph.graph import END, START, StateGraph

from crdtstate.integrations.langgraph import CrdtChannel, CrdtSaver, CrdtStore, increment

THREAD = {"configurable": {"thread_id": "garden"}}


class State(TypedDict):
    question: str
    plan: Annotated[dict, CrdtChannel()]


def researcher(name: str, fact: str):
    async def research(state: State, *, store) -> dict:
        await store.aput(("facts", name), state["question"], {"text": fact})
        done = [*state["plan"].get("done", []), f"{name} on {state['question']}"]
        return {"plan": {"done": done, "facts": increment()}}

    return research


def build() -> StateGraph:
    builder = StateGraph(State)
    facts = {"ann": "hedgehogs sleep in winter", "bob": "hedgehogs like beetles"}
    for name, fact in facts.items():
        builder.add_node(name, researcher(name, fact))
        builder.add_edge(START, name)
        builder.add_edge(name, END)
    return builder


async def run(file: Path) -> None:
    async with CrdtSaver.open(file) as saver:
        graph = build().compile(checkpointer=saver, store=CrdtStore(saver))

        # Two runs on one thread, at the same time.
        await asyncio.gather(
            graph.ainvoke({"question": "food", "plan": {}}, THREAD),
            graph.ainvoke({"question": "sleep", "plan": {}}, THREAD),
        )
        plan = (await graph.aget_state(THREAD)).values["plan"]
        print("facts:", plan["facts"])
        print("done:", ", ".join(sorted(plan["done"])))


def look(file: Path) -> None:
    """Programs without an event loop use the same names."""
    with CrdtSaver.open(file) as saver:
        print("checkpoints:", len(list(saver.list(THREAD))))
        for item in CrdtStore(saver).search(("facts",), query="beetles", limit=1):
            print("found:", item.value["text"], "by", item.namespace[1])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder) / "agents.db"))
        look(Path(folder) / "agents.db")
