"""
``crdtstate`` and ``python -m crdtstate``.

The command line lives in `cli` and needs the extra of that name. A relay does not: it runs from
here with nothing but the core dependencies, on servers that have no use for the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from crdtstate import __version__
from crdtstate.admission import is_private
from crdtstate.errors import CRDTStateError, UsageError
from crdtstate.relay import settings
from crdtstate.relay.server import announce_as_json, announce_as_text, serve
from crdtstate.relay.settings import DEFAULT_LISTEN, Settings, is_url
from crdtstate.relay.tokens import page_of
from crdtstate.transports.websocket import fingerprint

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
    options = vars(_parser().parse_args(arguments))
    path, only_check = options.pop("config"), options.pop("check_config")
    flags = {
        key: value for key, value in options.items() if value is not None and value is not False
    }
    try:
        found = gather(flags, path, only_check=only_check)
    except UsageError as exc:
        print(f"crdtstate: {exc}", file=sys.stderr)
        return 2
    if found is None:
        return 0
    try:
        asyncio.run(serve(found, announcing(found)))
    except (CRDTStateError, OSError) as exc:
        print(f"crdtstate: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def gather(flags: Mapping[str, Any], path: str | None, *, only_check: bool) -> Settings | None:
    """Return the settings of a relay; or print them, and return None.

    Raises:
        UsageError: Something in them cannot be.
    """
    found = settings.load(flags, os.environ, path)
    found.tls_context()
    if not only_check:
        return found
    print(json.dumps(found.as_json()) if found.json else found.as_toml(), end="\n" * found.json)
    return None


def announcing(found: Settings) -> Callable[[str, str], None]:
    """Return what announces a relay's address, and what to know about running it like this."""

    def announce(address: str, token: str) -> None:
        if address.startswith("ws:") and not is_private(address):
            print(
                f"crdtstate: warning: what is said at {address} is not encrypted; see wss://",
                file=sys.stderr,
            )
        # Not into a log: to a person, who can open it.
        if sys.stderr.isatty() and not address.startswith("unix:"):
            print(f"crdtstate: its page is {page_of(address, token)}", file=sys.stderr)
        if found.json:
            announce_as_json(address)
            return
        if found.tls_certificate is not None:
            pinned = f"{address}#{fingerprint(found.tls_certificate)}"
            print(f"crdtstate: to trust its certificate and no other: {pinned}", file=sys.stderr)
        if found.store is None:
            print("crdtstate: everything is kept in memory only; see --store", file=sys.stderr)
        announce_as_text(address)

    return announce


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
    url: dict[str, Any] = {"type": _url, "metavar": "URL"}
    file: dict[str, Any] = {"metavar": "FILE"}
    add("--listen", **url, help=f"default: {DEFAULT_LISTEN}; port 0: any")
    add("--advertise", **url, help="what members are told to reach it by")
    add("--mesh", **file, help="the join token, or the words, that the mesh asks for")
    add("--token-file", **file, help="the token of its pages; made if it is not there")
    add("--store", **file, help="the SQLite file that keeps everything; default: memory")
    add("--peer", **url, dest="peers", action="append", help="another relay; repeatable")
    add("--checkpoints", metavar="URL", action="append", help="a tier to keep them; repeatable")
    origins: dict[str, Any] = {"dest": "origins", "metavar": "URL", "action": "append"}
    add("--origin", **origins, help="whose pages may write documents; repeatable")
    add("--durability", choices=["process", "power"], help="default: process")
    add("--name", help="what peers see; default: relay")
    add("--tls-certificate", **file, help="PEM, for wss://")
    add("--tls-key", **file, help="its private key, if that is in another file")
    add("--drain", type=float, metavar="SECONDS", help="how long stopping may wait; default: 5")
    add("--attached", action="store_true", help="stop when standard input ends")
    add("--json", action="store_true", help="announce the address as JSON")
    add("--config", **file, help="settings, in TOML; flags and CRDTSTATE_RELAY_... go first")
    add("--check-config", action="store_true", help="print all settings, and do no more")
    return parser


if __name__ == "__main__":
    sys.exit(main())
