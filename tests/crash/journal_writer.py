"""
Processes that write to a journal until they are killed. Run by ``test_journal_kill.py``.

For each path on standard input, a child is forked that writes there as fast as it can. It tells
its process id, then every change that is confirmed. Forking saves the imports of each round.
"""

import os
import sys

from crdtstate.clock import Version
from crdtstate.stores import Entry, Saved
from crdtstate.stores.journal import Journal

WRITER = 42


def change(seq: int) -> Entry:
    return Entry("plan", WRITER, seq, f"change {seq} ".encode() * (1 + seq % 40))


def tell(line: str) -> None:
    # In one piece: a kill never leaves half a line.
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


def write(path: str) -> None:
    journal = Journal(path)
    newest = 0
    for item in journal.load():
        newest = item.version[WRITER] if isinstance(item, Saved) else item.seq
    journal.start("agent", WRITER, lambda: None)
    tell(f"pid {os.getpid()}")
    while True:
        entries = [change(newest + step) for step in range(1, 2 + newest % 3)]
        ticket = journal.append(entries)
        assert journal.committed == ticket, journal.failure
        newest += len(entries)
        tell(f"confirmed {newest}")
        if newest % 100 < 3:
            saved = Saved("plan", Version({WRITER: newest - 5}), f"snapshot {newest}".encode())
            journal.compact(saved, keep_bytes=10_000)


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if not child:
            write(line.strip())
        os.waitpid(child, 0)
        tell("end")


if __name__ == "__main__":
    main()
