"""
``crdtstate`` and ``python -m crdtstate``.

The command line lives in `cli` and needs the extra of that name. A relay does not: it runs from
here with nothing but the core dependencies, on servers that have no use for the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from crdtstate.errors import CRDTStateError
from crdtstate.relay.server import DEFAULT_LISTEN, announce_as_json, announce_as_text, serve

EXTRA = {"typer", "rich"}
HINT = "the command line needs more packages: pip install 'crdtstate[cli]'"


def main() -> int:
    """Run the command line; return the exit code."""
    try:
        from crdtstate import cli
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] not in EXTRA:
            raise
        return _bare(sys.argv[1:])
    return cli.main()


def _bare(arguments: list[str]) -> int:
    """Run what works without the extra."""
    if not arguments or arguments[0] not in ("relay", "-h", "--help"):
        print(f"crdtstate: {HINT}", file=sys.stderr)
        return 1
    options = _parser().parse_args(arguments)
    announce = announce_as_json if options.json else announce_as_text
    try:
        asyncio.run(
            serve(
                announce,
                listen=options.listen,
                store=options.store,
                peers=options.peer,
                durability=options.durability,
                name=options.name,
                attached=options.attached,
            )
        )
    except (CRDTStateError, OSError) as exc:
        print(f"crdtstate: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("crdtstate", epilog=f"For all commands {HINT[4:]}")
    relay = parser.add_subparsers(required=True).add_parser(
        "relay", help="run a relay", description="Run a relay until SIGTERM or Ctrl-C."
    )
    add = relay.add_argument
    add("--listen", default=DEFAULT_LISTEN, metavar="URL", help="default: %(default)s; port 0: any")
    add("--store", metavar="FILE", help="the SQLite file that keeps everything; default: memory")
    add("--peer", action="append", default=[], metavar="URL", help="another relay; repeatable")
    add("--durability", choices=["process", "power"], default="process")
    add("--name", default="relay", help="what peers see; default: %(default)s")
    add("--attached", action="store_true", help="stop when standard input ends")
    add("--json", action="store_true", help="announce the address as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
