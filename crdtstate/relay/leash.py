"""
A leash for processes that another program starts: standard input, kept open by that program.

It ends when that program does, however that ends, SIGKILL included. So a process that `follow`s it
never outlives its parent, on any system.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


def follow(on_end: Callable[[], object], on_line: Callable[[str], object] | None = None) -> None:
    """Call *on_line* with each line of standard input and *on_end* at its end, from a thread.

    They may raise RuntimeError, as event loops do that are closed already; then this ends.
    """

    def read() -> None:
        # Not through sys.stdin, whose lock a thread must not hold when the interpreter ends.
        rest = b""
        while data := os.read(0, 4096):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if on_line is not None:
                    on_line(line.decode(errors="replace"))
        on_end()

    def read_until_closed() -> None:
        try:
            read()
        except RuntimeError:
            pass

    threading.Thread(target=read_until_closed, name="leash", daemon=True).start()
