"""
Arguments and options that several commands have, so that they mean the same everywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crdtstate.errors import UsageError
from crdtstate.relay.server import import_modules

Peer = Annotated[
    str,
    typer.Option(
        envvar="CRDTSTATE_PEER", metavar="URL", help="The relay or agent to ask: ws://HOST:PORT."
    ),
]
MaybePeer = Annotated[
    str | None,
    typer.Option(
        envvar="CRDTSTATE_PEER", metavar="URL", help="The relay or agent to ask: ws://HOST:PORT."
    ),
]
Mesh = Annotated[
    Path | None,
    typer.Option(
        envvar="CRDTSTATE_MESH_FILE",
        metavar="FILE",
        help="The file of the join token, or of the words, that the mesh asks for.",
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        envvar="CRDTSTATE_TOKEN_FILE",
        metavar="FILE",
        help="The token of the relay's pages, if it does not follow from the mesh.",
    ),
]
StoreToRead = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Read a store, instead of a peer.")
]


def _import(names: list[str] | None) -> list[str] | None:
    try:
        import_modules(names or ())
    except UsageError as exc:
        raise typer.BadParameter(str(exc)) from exc
    return names


Modules = Annotated[
    list[str] | None,
    typer.Option(
        "--module",
        metavar="NAME",
        envvar="CRDTSTATE_MODULES",
        callback=_import,
        help="A Python module that registers validators and strategies; repeatable.",
    ),
]
"""It is imported as the command line is read."""

Timeout = Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How long to try.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Agent = Annotated[str, typer.Option(metavar="NAME", help="As whom to write.")]
WholePlace = Annotated[
    str, typer.Argument(metavar="PLACE", help="DOCUMENT/KIND/NAME or, in a map, .../NAME/KEY.")
]

Store = Annotated[Path, typer.Argument(metavar="STORE", help="A replica's SQLite file.")]
Tier = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Where the checkpoints are; otherwise beside the store."),
]
Kept = Annotated[
    str,
    typer.Argument(
        metavar="TIER", help="Where they are: a tier's URL, its file, or the store beside it."
    ),
]
Documents = Annotated[
    list[str] | None,
    typer.Option("--document", metavar="NAME", help="Only this document; repeatable."),
]
Paths = Annotated[
    list[str] | None,
    typer.Option("--path", metavar="PATH", help="Only this: plan, or plan['goal']; repeatable."),
]
Whose = Annotated[
    str | None, typer.Option("--agent", metavar="NAME", help="Only those of this agent.")
]


def choose(context: typer.Context, peer: str | None, store: Path | None) -> None:
    """Raise typer.BadParameter unless either a peer or a store is named. A store goes before a
    peer that only the environment names."""
    if store is not None:
        source = context.get_parameter_source("peer")
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter("give --peer or --store, not both")
    elif peer is None:
        raise typer.BadParameter("say whom to ask: --peer ws://HOST:PORT, or --store FILE")
