"""
Commanding a fleet from outside: ask how all agents do, and have them execute a command.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from crdtstate.cli.options import AsJson, Mesh, Modules, Peer, Timeout
from crdtstate.cli.places import parse_value
from crdtstate.cli.printing import as_text, print_columns, print_json
from crdtstate.cli.reaching import dialled, name_in, run
from crdtstate.config import Config
from crdtstate.controller import Controller
from crdtstate.errors import TransportError
from crdtstate.outcomes import Fulfilled, Outcome, Rejected, Results
from crdtstate.reports import Report

ACQUAINTANCE = 0.3
"""Seconds without a new member after which all are known."""

ACQUAINTANCES_MAX = 20

Name = Annotated[
    str, typer.Option("--as", metavar="NAME", help="As whom to command; see Config.controllers.")
]


def report(
    peer: Peer,
    mesh: Mesh = None,
    modules: Modules = None,
    timeout: Timeout = 5.0,
    name: Name = "cli",
    as_json: AsJson = False,
) -> None:
    """Say how all agents do: those that are there are asked, of the others is told what is known.

    Example: [cyan]crdtstate report --peer ws://127.0.0.1:8765[/cyan]
    """
    name = name_in(mesh, name)
    found = run(_report(peer, timeout, mesh, name))
    if as_json:
        print_json(
            {
                agent: {field.name: getattr(each, field.name) for field in fields(each)}
                for agent, each in found.items()
            }
        )
        return
    columns = ("AGENT", "STATE", "LAST SEEN", "CHECKPOINT", "CONFLICTS", "LAG", "TROUBLE")
    print_columns([columns, *(each.row() for each in found.values())])


async def _report(url: str, timeout: float, mesh: Path | None, name: str) -> Report:
    async with _commanding(url, timeout, mesh, name) as controller:
        found = await controller.report(timeout=timeout)
        return Report((agent, each) for agent, each in found.items() if agent != name)


def command(
    verb: Annotated[str, typer.Argument(metavar="VERB", help="What the agents serve.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=VALUE]...", help="With what; JSON, or else text."),
    ] = None,
    *,
    peer: Peer,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="AGENT", help="A name, or a pattern as agent-*; repeatable."),
    ] = None,
    expires: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.1, help="For how long who is away still does it."),
    ] = None,
    mesh: Mesh = None,
    modules: Modules = None,
    timeout: Timeout = 5.0,
    name: Name = "cli",
    as_json: AsJson = False,
) -> None:
    """Have agents execute a command, and say what came of it.

    Example: [cyan]crdtstate command pause reason=budget --target "agent-*"[/cyan]
    """
    given: dict[str, Any] = {}
    for each in arguments or ():
        key, separator, value = each.partition("=")
        if not separator:
            raise typer.BadParameter(f"{each!r} is not NAME=VALUE")
        given[key] = parse_value(value)
    name = name_in(mesh, name)
    found = run(_command(peer, timeout, mesh, name, verb, given, target or ["*"], expires))
    rows = {agent: _describe(each) for agent, each in found.items() if agent != name}
    if as_json:
        print_json({"id": found.id, "results": rows})
    else:
        print_columns([(agent, *_shown(row)) for agent, row in rows.items()] or [("nobody",)])
    if any(row["state"] != "fulfilled" for row in rows.values()):
        raise typer.Exit(1)


async def _command(
    url: str,
    timeout: float,
    mesh: Path | None,
    name: str,
    verb: str,
    arguments: dict[str, Any],
    target: list[str],
    expires: float | None,
) -> Results:
    async with _commanding(url, timeout, mesh, name) as controller:
        return await controller.issue(
            verb, target=target, timeout=timeout, expires=expires, arguments=arguments
        )


@asynccontextmanager
async def _commanding(
    url: str, timeout: float, mesh: Path | None, name: str
) -> AsyncIterator[Controller]:
    # It serves nothing itself, and says so at once.
    config = Config(command_grace=0.001)
    async with dialled(url, timeout, mesh, name, config) as replica:
        known = 0
        for _ in range(ACQUAINTANCES_MAX):
            if known == (known := len(replica.members())):
                break
            await asyncio.sleep(ACQUAINTANCE)
        yield Controller(replica)
        try:
            await replica.synced(timeout)
        except TimeoutError:
            raise TransportError(f"{url}: does not have it all after {timeout:g} s") from None


def _describe(outcome: Outcome) -> dict[str, Any]:
    match outcome:
        case Fulfilled(value):
            return {"state": "fulfilled", "value": value}
        case Rejected(reason):
            return {"state": "rejected", "reason": reason}
    return {"state": "no answer"}


def _shown(row: dict[str, Any]) -> tuple[str, str]:
    value = row.get("value")
    return row["state"], row.get("reason") or ("" if value is None else as_text(value))
