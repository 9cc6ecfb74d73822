"""The command line: ``python -m benchmarks [names] [--quick] [--json]``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from benchmarks.applies import applies
from benchmarks.checkpoints import checkpoints
from benchmarks.faults import faults
from benchmarks.fleet import fleet
from benchmarks.growth import growth
from benchmarks.langgraph import langgraph
from benchmarks.many import many, relayed, stalled
from benchmarks.measure import FULL, QUICK, Effort, Result
from benchmarks.mesh import mesh, thousand
from benchmarks.propagation import propagation
from benchmarks.reads import reads
from benchmarks.recovery import recovery
from benchmarks.report import as_json, as_table, machine
from benchmarks.security import security
from benchmarks.service import service
from benchmarks.signing import signing
from benchmarks.writes import writes

BENCHMARKS: dict[str, Callable[[Effort], Sequence[Result]]] = {
    "writes": writes,
    "applies": applies,
    "reads": reads,
    "propagation": propagation,
    "fleet": fleet,
    "many": many,
    "relayed": relayed,
    "stalled": stalled,
    "growth": growth,
    "recovery": recovery,
    "checkpoints": checkpoints,
    "service": service,
    "security": security,
    "signing": signing,
    "langgraph": langgraph,
    "faults": faults,
    "mesh": mesh,
    "thousand": thousand,
}
LONG = {"thousand", "faults"}
"""Those that run only if they are named."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line names and print what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="See benchmarks/.")
    known = ", ".join(BENCHMARKS)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="name",
        help=f"which: {known}; default: all but " + " and ".join(sorted(LONG)),
    )
    parser.add_argument("--quick", action="store_true", help="small versions, under two minutes")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {known}")
    effort = QUICK if options.quick else FULL
    if not options.json:
        print("\n".join(f"{what + ':':<10} {fact}" for what, fact in machine().items()))
    started = time.monotonic()
    results: dict[str, Sequence[Result]] = {}
    for name in options.names or [name for name in BENCHMARKS if name not in LONG]:
        print(f"{time.monotonic() - started:5.0f} s  {name} ...", file=sys.stderr, flush=True)
        results[name] = BENCHMARKS[name](effort)
    print(as_json(results) if options.json else as_table(results))
    print(f"{time.monotonic() - started:5.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
