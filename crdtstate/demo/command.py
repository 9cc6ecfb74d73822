"""
The command ``crdtstate demo``: the story on a screen, or as JSON.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from crdtstate.demo.fleet import DemoFailure, Fleet
from crdtstate.demo.screen import Lines, Screen, Silence, Table
from crdtstate.demo.story import Report, Story
from crdtstate.errors import UsageError


async def run(
    agents: int, path: Path | None, *, seed: int, keep: Path | None, as_json: bool
) -> None:
    """Run the demo and show it.

    Args:
        agents: How many, three at least.
        path: The tree to survey; the standard library if None.
        seed: Chooses who is cut off and who is killed.
        keep: Where the stores stay; None removes them.
        as_json: Print only the report, as JSON.

    Raises:
        DemoFailure: Something was not as it must be.
        UsageError: An argument cannot be.
    """
    if agents < 3:
        raise UsageError("the demo needs three agents: two to cut off and one to kill")
    root = (path or Path(sysconfig.get_paths()["stdlib"])).resolve()
    if not root.is_dir():
        raise UsageError(f"{root} is not a directory")
    _end_on_sigterm()
    with _folder(keep) as folder:
        fleet = Fleet(folder, root, agents, run=f"demo-{seed}")
        screen = _screen(fleet, as_json)
        story = Story(fleet, seed, screen.say)
        try:
            with screen:
                await story.tell()
            await story.end()
        finally:
            await fleet.close()
    report = story.report
    if as_json:
        print(json.dumps({"ok": report.ok, **asdict(report)}))
    else:
        screen.conclude(report, keep)
    judge(report)


def judge(report: Report) -> None:
    """Raise DemoFailure if the replicas were not equal, or not right."""
    if not report.ok:
        first, more = report.differences[0], len(report.differences) - 1
        raise DemoFailure(f"{first}" + (f" (and {more} more, see above)" if more else ""))


def _end_on_sigterm() -> None:
    """Let SIGTERM clean up as Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None
    try:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    except (NotImplementedError, RuntimeError):
        pass


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="crdtstate-demo-") as folder:
            yield Path(folder)
        return
    keep.mkdir(parents=True, exist_ok=True)
    if any(keep.glob("*.db")):
        raise UsageError(f"{keep} holds stores already; name an empty directory")
    yield keep


def _screen(fleet: Fleet, as_json: bool) -> Screen:
    if as_json:
        return Silence(fleet)
    return Table(fleet) if Table.can_show() else Lines(fleet)
