"""
The relay: a replica run on its own, for agents that cannot reach each other.

    crdtstate relay --listen ws://127.0.0.1:8765 --store relay.db

It is an ordinary replica with ``role="relay"`` that everybody dials: it keeps what it gets, sends
it on, and holds no power over anybody's data. Relays given each other as peers form one mesh. On
the port of the mesh it answers HTTP too:

    /mesh       the mesh, for replicas (the path is added to URLs without one)
    /           a page for people: who is there, what they hold, what happens
    /live       the stream behind that page, a websocket
    /yjs/NAME   a document of native types, for yjs and y-websocket in browsers
    /lanes/NAME any other document, for crdtstate.js, which lies at /crdtstate.js
    /healthz    200 when it is ready, 503 and the reasons when it is not
    /metrics    how it is doing, for Prometheus
    /status     what it has and who is connected
    /digest     hashes of its documents: equal on replicas with equal content

All but ``/``, ``/mesh``, ``/healthz`` and the page's files take a token, see `tokens`; `crdtstate
page` tells the URL of the page with it.

`settings` says what kind of relay it is, `server` runs the process, `pages` makes the answers: from
a `glance` at the replica, the `holdings` of its documents, and the `chronicle` of its events.
`metrics` and `live` put them into words. The page itself is what lies in ``page/``, as it is.

Browsers that write come through `browsers` and are `guests`: `rooms` is for Yjs (in the words of
`yprotocol`), `desks` for crdtstate.js (in those of `plain`).
"""

from crdtstate.relay.pages import digest, digests, status
from crdtstate.relay.server import serve

__all__ = ["digest", "digests", "serve", "status"]
