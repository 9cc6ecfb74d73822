"""
An agent without an event loop: ordinary threads that share state with the rest of the fleet.

`crdtstate.blocking.Replica` has the names of `crdtstate.Replica`, without ``async``.
"""

from concurrent.futures import ThreadPoolExecutor

from crdtstate.blocking import Replica


def main() -> None:
    with (
        Replica("relay", listen="ws://127.0.0.1:0", role="relay") as relay,
        Replica("agent-7", peers=[relay.address]) as replica,
    ):
        tokens = replica.counter("tokens")
        results = replica.map("results")

        def work(number: int) -> None:
            with replica.transaction(message=f"task {number}"):
                results[f"task-{number}"] = number * number
                tokens.increment(10)

        with ThreadPoolExecutor() as threads:
            list(threads.map(work, range(8)))
        replica.synced(timeout=5)

        print("the relay has:", dict(sorted(relay.map("results").items())))
        print("tokens:", int(relay.counter("tokens")))


if __name__ == "__main__":
    main()
