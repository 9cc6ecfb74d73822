"""
``crdtstate`` and ``python -m crdtstate``.

The command line lives in `cli` and needs the extra of that name. A relay does not: it runs from
here with nothing but the core dependencies, on servers that have no use for the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import sys
from collections.abc import Callable
from urllib.parse import urlsplit

from crdtstate import __version__
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
    if not arguments or not arguments[0].startswith(("relay", "-")):
        print(f"crdtstate: {HINT}", file=sys.stderr)
        return 2
    options = _parser().parse_args(arguments)
    try:
        asyncio.run(
            serve(
                announcing(options.json, options.store),
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


def announcing(as_json: bool, store: object) -> Callable[[str], None]:
    """Return what announces a relay's address, and what to know about running it like this."""

    def announce(address: str) -> None:
        if not _is_loopback(address):
            print(
                f"crdtstate: warning: who can reach {address} can read and write everything",
                file=sys.stderr,
            )
        if as_json:
            announce_as_json(address)
            return
        if store is None:
            print("crdtstate: everything is kept in memory only; see --store", file=sys.stderr)
        announce_as_text(address)

    return announce


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(urlsplit(address).hostname or "").is_loopback
    except ValueError:
        return False


def is_url(text: str) -> bool:
    """Whether *text* is a URL of a relay or agent."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("ws", "wss") and bool(parts.hostname and (parts.port or 1))
    except ValueError:
        return False


def _url(text: str) -> str:
    if not is_url(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a URL like ws://127.0.0.1:8765")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("crdtstate", epilog=f"Only relays run like this: {HINT}")
    parser.add_argument("--version", action="version", version=f"crdtstate {__version__}")
    relay = parser.add_subparsers(required=True).add_parser(
        "relay", help="run a relay", description="Run a relay until SIGTERM or Ctrl-C."
    )
    add = relay.add_argument
    add(
        "--listen",
        type=_url,
        default=DEFAULT_LISTEN,
        metavar="URL",
        help="default: %(default)s; port 0: any",
    )
    add("--store", metavar="FILE", help="the SQLite file that keeps everything; default: memory")
    add(
        "--peer",
        type=_url,
        action="append",
        default=[],
        metavar="URL",
        help="another relay; repeatable",
    )
    add("--durability", choices=["process", "power"], default="process")
    add("--name", default="relay", help="what peers see; default: %(default)s")
    add("--attached", action="store_true", help="stop when standard input ends")
    add("--json", action="store_true", help="announce the address as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
