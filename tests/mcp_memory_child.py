"""
A nursery of memory servers: it imports what they need once, and forks as many as it is told to.

For each line ``IN OUT PATH`` on its input, a server is forked whose standard input and output are
these descriptors, which it inherited, and which serves the memory PATH. It answers with the pid.
"""

from __future__ import annotations

import os
import sys

import crdtstate.integrations.mcp_memory.server
import crdtstate.transports.unix  # noqa: F401  (before the fork, or each child would)
from crdtstate import cli


def main() -> None:
    for line in sys.stdin:
        source, sink, path = line.split()
        if (child := os.fork()) == 0:
            os.dup2(int(source), 0)
            os.dup2(int(sink), 1)
            os.closerange(3, 256)
            sys.argv = ["crdtstate", "mcp-memory", path, "--name", f"assistant-{os.getpid()}"]
            os._exit(cli.main())
        # Or nobody would see that the child has ended.
        os.close(int(source))
        os.close(int(sink))
        print(child, flush=True)


if __name__ == "__main__":
    main()
