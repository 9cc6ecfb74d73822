"""
What a person sees of the demo: a live table on a terminal, a few lines anywhere else.
"""

from __future__ import annotations

import asyncio
import sys
import time
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
        for line in verdict(report, keep):
            print(line)

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

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet)
        self._console = Console(highlight=False)
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
        for member in (*fleet.agents, fleet.relay):
            state = state_of(fleet, member)
            known = bool(member.version) and state != "killed"
            lag = sum(max(0, seq - member.version.get(w, 0)) for w, seq in newest.items())
            is_relay = member is fleet.relay
            grid.add_row(
                member.name,
                "" if is_relay else ProgressBar(member.of or 1, member.done, width=20),
                "" if is_relay or not member.of else f"{member.done}/{member.of}",
                str(member.peers) if known else "-",
                str(member.version.total) if known else "-",
                str(lag) if known else "-",
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


def verdict(report: Report, keep: Path | None) -> list[str]:
    """The report in a dozen lines."""
    said = [
        f"Surveyed {report.files:,} files, {report.lines:,} lines, {report.functions:,} functions, "
        f"{report.classes:,} classes,",
    ]
    return said
