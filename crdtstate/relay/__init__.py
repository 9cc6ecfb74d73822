"""
The relay: a replica run on its own, for agents that cannot reach each other.

    crdtstate relay --listen ws://127.0.0.1:8765 --store relay.db

It is an ordinary replica with ``role="relay"`` that everybody dials: it keeps what it gets, sends
it on, and holds no power over anybody's data. Relays given each other as peers form one mesh. On
the port of the mesh it answers plain HTTP too:

    /mesh       the mesh, for replicas (the path is added to URLs without one)
    /healthz    200 when it is ready, 503 and the reasons when it is not
    /status     what it has and who is connected
    /digest     hashes of its documents: equal on replicas with equal content

`pages` makes these answers, `server` runs the process.
"""

from crdtstate.relay.pages import digest, digests, health, status
from crdtstate.relay.server import serve

__all__ = ["digest", "digests", "health", "serve", "status"]
