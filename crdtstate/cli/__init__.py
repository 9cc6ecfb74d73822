"""
The command line: what a person or a script does with a fleet from outside.

    crdtstate set main/map/plan/goal "ship it" --peer ws://127.0.0.1:8765

Commands that read or write dial a peer with a replica that lives in memory only, wait until both
have the same, do what they were asked, wait until the peer has that too, and leave. A place is
written ``DOCUMENT/KIND/NAME[/KEY]``.

What was asked for goes to stdout, errors and notes to stderr. Values come from agents, so nothing
in them that a terminal would obey is ever printed (`printing`). Exit codes: 0 done, 1 failed,
2 wrong usage, 130 interrupted.

Here is which commands there are; each module has those of one idea.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from crdtstate import __version__
from crdtstate.cli import checkpoints, commanding, doors, history, looking, meshing, running, values
from crdtstate.cli.printing import printable
from crdtstate.errors import CRDTStateError

VALUES, LOOK, RUN, JOIN = "Read and write", "Look", "Run", "Who may join"

app = typer.Typer(
    name="crdtstate",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command(rich_help_panel=VALUES)(values.get)
app.command("set", rich_help_panel=VALUES)(values.set_)
# A number below zero is no option.
app.command(rich_help_panel=VALUES, context_settings={"ignore_unknown_options": True})(
    values.increment
)
app.command(rich_help_panel=VALUES)(values.watch)

app.command(rich_help_panel=LOOK)(looking.peers)
app.command(rich_help_panel=LOOK)(looking.status)
app.command(rich_help_panel=LOOK)(looking.page)
app.command(rich_help_panel=LOOK)(looking.conflicts)
app.command(rich_help_panel=LOOK)(looking.explain)
app.command(rich_help_panel=LOOK)(commanding.report)
app.command(rich_help_panel=LOOK)(history.history)
app.command(rich_help_panel=LOOK)(looking.audit)
app.command(rich_help_panel=LOOK)(looking.verify)

saved = typer.Typer(
    help="Look at checkpoints, check and compare them, make one, or bring one back.",
    no_args_is_help=True,
)
app.add_typer(saved, name="checkpoints", rich_help_panel=LOOK)
saved.command("list")(checkpoints.list_checkpoints)
saved.command("verify")(checkpoints.verify_checkpoints)
saved.command("diff")(checkpoints.compare_checkpoints)
saved.command("create")(checkpoints.create_checkpoint)
saved.command("restore")(checkpoints.restore_checkpoint)

app.command(rich_help_panel=RUN)(commanding.command)
app.command("relay", rich_help_panel=RUN)(running.run_relay)
app.command(rich_help_panel=RUN)(doors.mcp)
app.command("mcp-memory", rich_help_panel=RUN)(doors.mcp_memory)
app.command(rich_help_panel=RUN)(running.simulate)
app.command(rich_help_panel=RUN)(running.demo)

app.command(rich_help_panel=JOIN)(meshing.invite)
app.command(rich_help_panel=JOIN)(meshing.revoke)
app.command(rich_help_panel=JOIN)(meshing.keygen)
mesh = typer.Typer(
    help="Make a mesh with keys, look at its files, and replace what is in them.",
    no_args_is_help=True,
)
app.add_typer(mesh, name="mesh", rich_help_panel=JOIN)
mesh.command("create")(meshing.create_mesh)
mesh.command("show")(meshing.show_mesh)
mesh.command("renew")(meshing.renew)
mesh.command("rotate")(meshing.rotate_secret)


def main() -> int:
    """Run the command line; return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="crdtstate")
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CRDTStateError, OSError) as exc:
        print(f"crdtstate: {printable(str(exc))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 0
    return 0


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"crdtstate {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Shared state for fleets of AI agents: look at it, change it, run relays, see it work.

    Start with [bold]crdtstate demo[/bold].
    """
