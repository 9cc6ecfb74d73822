"""
What runs for a while: a relay, a simulation, the demo.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from crdtstate import relay
from crdtstate.__main__ import announcing, gather
from crdtstate.cli.options import AsJson
from crdtstate.cli.printing import count, note, print_columns, print_json
from crdtstate.cli.reaching import check_url, run
from crdtstate.errors import CRDTStateError, UsageError
from crdtstate.relay.settings import DEFAULT_LISTEN


class Durability(StrEnum):
    """What a commit survives; see `Replica`."""

    process = "process"
    power = "power"


def run_relay(
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help=f"Where to listen; port 0 takes any free one. [default: {DEFAULT_LISTEN}]",
        ),
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="What members are told to reach it by, if that is not where it listens.",
        ),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The join token, or the words, that the mesh asks for."),
    ] = None,
    token_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The token of its pages; made if it is not there."),
    ] = None,
    store: Annotated[
        str | None, typer.Option(metavar="FILE", help="The SQLite file that keeps everything.")
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option("--peer", metavar="URL", help="Another relay; repeatable."),
    ] = None,
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A tier to keep checkpoints in; repeatable."),
    ] = None,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--module",
            metavar="NAME",
            help="A Python module that registers validators of documents; repeatable.",
        ),
    ] = None,
    origins: Annotated[
        list[str] | None,
        typer.Option(
            "--origin",
            metavar="URL",
            help="Whose pages may write documents, as https://app.example; repeatable.",
        ),
    ] = None,
    durability: Annotated[
        Durability | None,
        typer.Option(help="What a commit survives: a kill, or a power cut as well."),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="What peers see.")] = None,
    tls_certificate: Annotated[
        str | None, typer.Option(metavar="FILE", help="The certificate in PEM, for wss://.")
    ] = None,
    tls_key: Annotated[
        str | None, typer.Option(metavar="FILE", help="Its key, if that is in another file.")
    ] = None,
    drain: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long stopping may wait for peers to catch up."),
    ] = None,
    attached: Annotated[
        bool, typer.Option("--attached", help="Stop when standard input ends.")
    ] = False,
    as_json: AsJson = False,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="Settings in TOML, as in examples/.")
    ] = None,
    check_config: Annotated[
        bool, typer.Option("--check-config", help="Print all settings, and do no more.")
    ] = False,
) -> None:
    """Run a relay, for agents that cannot reach each other.

    Ctrl-C or SIGTERM ends it in order, a second one at once. The mesh is on
    /mesh, a page for people on / (see [bold]crdtstate page[/bold]); /healthz,
    /metrics, /status and /digest answer plain HTTP, all but the first with the
    token of the page. Without --mesh it is for processes of the same user on
    this machine, and listens on nothing else.

    Each setting can also come from the file, by the name of its flag, or from
    the environment, as CRDTSTATE_RELAY_LISTEN. A flag goes before that, and
    that before the file.

    Example: [cyan]crdtstate relay --listen ws://127.0.0.1:8765 --store relay.db[/cyan]
    """
    for url in [*([listen] if listen is not None else []), *(peers or [])]:
        check_url(url)
    flags = {
        "listen": listen,
        "advertise": advertise,
        "mesh": mesh,
        "token_file": token_file,
        "store": store,
        "peers": tuple(peers) if peers else None,
        "checkpoints": tuple(checkpoints) if checkpoints else None,
        "modules": tuple(modules) if modules else None,
        "origins": tuple(origins) if origins else None,
        "durability": durability and durability.value,
        "name": name,
        "tls_certificate": tls_certificate,
        "tls_key": tls_key,
        "drain": drain,
        "attached": attached or None,
        "json": as_json or None,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    try:
        found = gather(given, config, only_check=check_config)
    except UsageError as exc:
        note(str(exc))
        raise typer.Exit(2) from None
    if found is not None:
        run(relay.serve(found, announcing(found)))


def simulate(
    agents: Annotated[
        int | None, typer.Option(min=2, help="How many; otherwise each seed decides.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to run.")] = 1,
    changes: Annotated[int, typer.Option(min=1, help="Writes of each seed.")] = 60,
    faults: Annotated[
        bool, typer.Option("--faults/--no-faults", help="Whether anything goes wrong.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Run fleets in virtual time through all that can go wrong.

    Invariants are checked at every step; a seed shows the same history again.

    Example: [cyan]crdtstate simulate --agents 20 --seed 7 --seeds 50[/cyan]
    """
    from crdtstate.simulation import CampaignReport

    jobs = [(number, agents, changes, faults) for number in range(seed, seed + seeds)]
    workers = min(len(jobs), os.cpu_count() or 1)
    # Signals are for this process only, and only once there is a pool: leaving it ends the others.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with multiprocessing.Pool(workers, _leave_signals) as pool:
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            outcomes: Iterable[Any] = pool.imap_unordered(_run_seed, jobs)
            if sys.stderr.isatty():
                console = Console(stderr=True)
                outcomes = track(outcomes, "Simulating", len(jobs), console=console, transient=True)
            report = CampaignReport.of(outcomes)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        finally:
            signal.signal(signal.SIGTERM, before)
    if as_json:
        print_json(report.as_json())
    else:
        print_columns(list(_sum_up(report)))
    if report.failures:
        numbers = ", ".join(str(failure.seed) for failure in report.failures[:10])
        failed = f"{len(report.failures)} of {count(seeds, 'seed')} failed"
        raise CRDTStateError(f"{failed}: {numbers}")


def _leave_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _terminate(*_: object) -> None:
    raise SystemExit(143)


def _run_seed(job: tuple[int, int | None, int, bool]) -> Any:
    from crdtstate.simulation import run_seed

    seed, agents, changes, faults = job
    return run_seed(seed, agents=agents, changes=changes, faults=faults)


def _sum_up(report: Any) -> Iterator[tuple[str, str]]:
    yield "seeds", str(report.seeds)
    yield "failures", str(len(report.failures))
    for failure in report.failures:
        yield f"  {failure.seed}", f"{failure.invariant}: {failure.detail}"
    yield "redundancy", f"{report.redundancy:.4f}"
    for label, times in (("delivery", report.delivery_ms), ("at the last", report.last_ms)):
        yield label, ", ".join(f"{name} {value:g} ms" for name, value in times.items())
    yield "bytes per change", f"{report.bytes_per_change:g}"
    yield "trace", report.trace


def demo(
    agents: Annotated[int, typer.Option(min=3, max=100, help="How many agent processes.")] = 10,
    path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What to survey; else Python's standard library."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses who is cut off and who is killed.")] = 1,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the stores there, to look at them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """See it work: real processes, real work, real faults.

    A relay and agents run as processes on this machine. The agents survey a
    tree of Python source together, two of them lose the network meanwhile,
    and one is killed. At the end all replicas must be equal, and what they
    hold must be exactly what one process finds alone.

    Example: [cyan]crdtstate demo --agents 10[/cyan]
    """
    from crdtstate.demo import command

    run(command.run(agents, path, seed=seed, keep=keep, as_json=as_json))
