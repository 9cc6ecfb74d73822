"""
What a person sees of the demo: a live table on a terminal, a few lines anywhere else.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as Grid
from rich.text import Text

from crdtstate.demo.fleet import Fleet, Member
from crdtstate.demo.story import Report

FRAME = 0.25
"""Seconds between two pictures of the table."""

LINE_EVERY = 5.0
"""Seconds between two lines of progress."""

COLOURS = {
    "starting": "dim",
    "working": "",
    "cut off": "yellow",
    "catching up": "yellow",
    "killed": "red",
    "recovering": "yellow",
    "recovered": "green",
    "done": "green",
    "up": "green",
    "ok": "bold green",
    "WRONG": "bold red",
}


class Screen:
    """Shows a fleet at work, between ``with`` and its end, and then the verdict."""

    every = FRAME

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.began = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._show_again()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def say(self, text: str) -> None:
        """Show what has just happened."""

    def show(self) -> None:
        """Show how things stand."""

    def conclude(self, report: Report, keep: Path | None) -> None:
        """Show the verdict."""
        print()
        for label, text in verdict(report, keep):
            print(f"{label:>9}  {text}")

    def _show_again(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self.every, self._show_again)
        self.show()


class Silence(Screen):
    """Shows nothing."""


class Lines(Screen):
    """Prints lines: what happens, and now and then how far it is."""

    every = LINE_EVERY

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:5.1f} s  {text}", flush=True)

    def show(self) -> None:
        if self.fleet.of:
            self.say(f"{self.fleet.done} of {self.fleet.of} files done")


class Table(Screen):
    """A table of all members that is drawn again and again, and the news below."""

    def __init__(self, fleet: Fleet, console: Console | None = None) -> None:
        super().__init__(fleet)
        self._console = console or Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False)

    @staticmethod
    def can_show() -> bool:
        """Whether standard output is a terminal."""
        return sys.stdout.isatty()

    def __enter__(self) -> Self:
        self._live.start()
        return super().__enter__()

    def __exit__(self, *exc: object) -> None:
        super().__exit__()
        self.show()
        self._live.stop()

    def conclude(self, report: Report, keep: Path | None) -> None:
        grid = Grid(box=None, pad_edge=False, show_header=False)
        grid.add_column(justify="right")
        grid.add_column()
        for label, text in verdict(report, keep):
            grid.add_row(Text(label, COLOURS.get(label, "dim")), Text(text))
        self._console.print(Group("", grid))

    def say(self, text: str) -> None:
        self._live.console.print(Text(f"{time.monotonic() - self.began:5.1f} s  {text}", "dim"))

    def show(self) -> None:
        self._live.update(Group(self._members(), self._total()), refresh=True)

    def _members(self) -> Grid:
        grid = Grid(box=None, pad_edge=False, header_style="bold")
        grid.add_column("agent")
        grid.add_column("")
        for title in ("files", "peers", "changes", "lag"):
            grid.add_column(title, justify="right")
        grid.add_column("state")
        fleet = self.fleet
        newest = fleet.newest()
        for member in fleet.members:
            state = state_of(fleet, member)
            known = bool(member.version) and state != "killed"
            is_relay = member is fleet.relay
            grid.add_row(
                member.name,
                "" if is_relay else ProgressBar(member.of or 1, member.done, width=20),
                "" if is_relay or not member.of else f"{member.done}/{member.of}",
                str(member.peers) if known else "-",
                str(member.version.total) if known else "-",
                str(fleet.lag(member, newest)) if known else "-",
                Text(state, COLOURS[state]),
            )
        return grid

    def _total(self) -> Text:
        fleet = self.fleet
        share = fleet.done / fleet.of if fleet.of else 0
        return Text(
            f"\n{time.monotonic() - self.began:5.1f} s  {fleet.done} of {fleet.of} files "
            f"({share:.0%}), {fleet.newest().total} changes"
        )


def state_of(fleet: Fleet, member: Member) -> str:
    """One word, or two, on how a member is."""
    if member is fleet.relay:
        return "up" if fleet.url else "starting"
    if member.trouble and not (member.trouble == "recovered" and member.is_done):
        return member.trouble
    if "ready" not in member.said:
        return "starting"
    return "done" if member.is_done else "working"


def verdict(report: Report, keep: Path | None) -> Iterator[tuple[str, str]]:
    """The report as lines: a label and what is to say."""
    yield (
        "surveyed",
        f"{report.files:,} files, {report.lines:,} lines, {report.functions:,} functions, "
        f"{report.classes:,} classes, {report.modules} imported modules, "
        f"{report.unparsable} files that do not parse",
    )
    yield (
        "work",
        f"{report.agents} agents in {report.survey_s:.1f} s: {report.changes:,} changes, "
        f"{report.changes_per_s:.0f} a second, each to {report.replicas} replicas",
    )
    yield (
        "cut off",
        f"{' and '.join(report.cut)} for {report.cut_s:.1f} s, in which they did "
        f"{report.files_while_cut} files; had everything {report.mend_s:.2f} s after the mending",
    )
    yield (
        "killed",
        f"{report.killed} after {report.files_when_killed} files, {report.files_in_store} of which "
        f"its store had; equal with the others {report.recovery_s:.2f} s after its restart",
    )
    for when, times in (("at work", report.at_work_ms), ("at rest", report.at_rest_ms)):
        if times:
            yield (
                when,
                f"a change was at another agent after {times['p50']:g} ms (p50), "
                f"{times['p99']:g} ms (p99); {times['arrivals']:,} arrivals",
            )
    for difference in report.differences:
        yield "WRONG", difference
    if report.ok:
        equal = f"{report.replicas} replicas and a newcomer have equal content"
        yield "ok", f"{equal} (digest {report.digest})"
        yield "ok", "it is exactly what one process finds alone"
        yield "ok", f"{report.stores_verified} stores are sound"
    if keep is not None:
        yield "kept", f"{keep}; try: crdtstate get survey/counter/lines --store {keep}/relay.db"
    yield "time", f"{report.elapsed_s:.1f} s"
