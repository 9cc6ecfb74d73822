"""
LangGraph on replicated documents: a checkpointer, a store and a channel that merges.

    async with CrdtSaver.open("agents.db") as saver:
        graph = builder.compile(checkpointer=saver, store=CrdtStore(saver))

or, where a replica runs already, ``CrdtSaver(replica)``. Needs the extra ``crdtstate[langgraph]``.

    merging  the state in a channel, as a CRDT        channel  `CrdtChannel`
    blobs    bytes of any size, as deltas             threads  a thread as a document
    home     the loop that all of it happens on       saver    `CrdtSaver`
    finding  filters and search                       store    `CrdtStore`
"""

try:
    import langgraph.graph  # noqa: F401
except ImportError as exc:
    raise ImportError(
        "LangGraph is not installed; install it with: pip install 'crdtstate[langgraph]'"
    ) from exc

from crdtstate.integrations.langgraph.channel import CrdtChannel
from crdtstate.integrations.langgraph.merging import DELETE, increment
from crdtstate.integrations.langgraph.saver import CrdtSaver
from crdtstate.integrations.langgraph.store import CrdtStore

__all__ = ["DELETE", "CrdtChannel", "CrdtSaver", "CrdtStore", "increment"]
