"""
Space-time diagrams: who wrote and saw what, when.

The drawing is Lamport's ("Time, Clocks, and the Ordering of Events", 1978): a line for each
process, time along it, an arrow for each message. Here an arrow is a change that arrived. As text
it is a table with a column for each agent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, NamedTuple, Protocol

from crdtstate.slots import SEPARATOR
from crdtstate.values import unpack, unpack_key

LABEL_CHARS = 32
VIEWS = frozenset("mcrs")


class Op(Protocol):
    """A write, as the oracle keeps it."""

    @property
    def path(self) -> str: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def amount(self) -> int: ...


class Change(Protocol):
    """A change, as the oracle keeps it."""

    @property
    def ops(self) -> Sequence[Op]: ...
    @property
    def agent(self) -> str: ...
    @property
    def at(self) -> float: ...


class Moment(NamedTuple):
    """Something that happened.

    Attributes:
        at: When, in seconds since the simulation began.
        agent: To whom; empty for what happened to the network.
        kind: ``"wrote"``, ``"saw"``, ``"joined"`` (a snapshot), ``"crashed"``, ``"power cut"``,
            ``"restarted"``, ``"partitioned"``, ``"healed"`` or ``"event"``.
        what: The change written or seen, the event, or text.
    """

    at: float
    agent: str
    kind: str
    what: Any

    def __str__(self) -> str:
        return f"{self.at:9.3f} s  {self.agent:12} {_MARKS.get(self.kind, '')} {_text(self)}"


class Diagram:
    """A space-time diagram; print it, or let a notebook show it.

    Args:
        names: The agents, from top to bottom, or left to right.
        moments: What happened, in order.
        since: The time at which it begins,
        until: and at which it ends.
    """

    def __init__(
        self, names: Sequence[str], moments: Sequence[Moment], since: float, until: float
    ) -> None:
        self.names = list(names)
        self.moments = [moment for moment in moments if _is_shown(moment)]
        self.since = since
        self.until = max(until, since + 0.001)

    # As text

    def __str__(self) -> str:
        width = max([LABEL_CHARS + 2, *(len(name) for name in self.names)])
        lines = ["     time  " + "  ".join(f"{name:{width}}" for name in self.names).rstrip()]
        for at, cells in self._rows():
            if "" in cells:
                lines.append(f"{at:9.3f}  " + f" {cells['']} ".center(2 * width, "-"))
                continue
            row = "  ".join(f"{cells.get(name, '·'):{width}}" for name in self.names)
            lines.append(f"{at:9.3f}  {row}".rstrip())
        return "\n".join(lines)

    def _rows(self) -> Iterator[tuple[float, dict[str, str]]]:
        """What happened at one time, by agent; several rows if one agent did several things."""
        at, cells = 0.0, dict[str, str]()
        for moment in self.moments:
            if cells and (moment.at != at or moment.agent in cells or not moment.agent):
                yield at, cells
                cells = {}
            at = moment.at
            cells[moment.agent] = f"{_MARKS[moment.kind]} {_text(moment)}"
            if not moment.agent:
                yield at, cells
                cells = {}
        if cells:
            yield at, cells

    # As a picture

    def _repr_html_(self) -> str:
        return f'<div style="overflow-x:auto">{self._repr_svg_()}</div>'

    def _repr_svg_(self) -> str:
        height = _TOP + _LANE * len(self.names) + 30
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
            f'viewBox="0 0 {_WIDTH} {height}" role="img" font-family="sans-serif" font-size="11">',
            "<title>Who wrote and saw what, when</title>",
            f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
            *self._bands(height),
            *self._lanes(),
            *self._arrows(),
            *self._points(),
            *self._scale(height),
            "</svg>",
        ]
        return "\n".join(parts)

    def _x(self, at: float) -> float:
        span = _WIDTH - _LEFT - 20
        return round(_LEFT + span * (at - self.since) / (self.until - self.since), 1)

    def _y(self, agent: str) -> int:
        return _TOP + _LANE * self.names.index(agent) + _LANE // 2

    def _color(self, agent: str) -> str:
        return _COLORS[self.names.index(agent) % len(_COLORS)]

    def _bands(self, height: int) -> Iterator[str]:
        """The times during which the network was cut."""
        start: float | None = None
        for moment in [*self.moments, Moment(self.until, "", "healed", "")]:
            if moment.kind == "partitioned" and start is None:
                start = moment.at
            elif moment.kind == "healed" and start is not None:
                x, end = self._x(start), self._x(moment.at)
                yield (
                    f'<rect x="{x}" y="{_TOP}" width="{round(end - x, 1)}" '
                    f'height="{height - _TOP - 30}" fill="#f6e9c8"/>'
                    f'<text x="{x + 4}" y="{_TOP - 4}" fill="#8a6d1f">partition</text>'
                )
                start = None

    def _lanes(self) -> Iterator[str]:
        for name in self.names:
            y = self._y(name)
            yield f'<text x="8" y="{y + 4}" fill="{self._color(name)}">{escape(name)}</text>'
            since, is_up = self.since, True
            for moment in self.moments:
                if moment.agent != name or moment.kind not in _TURNS:
                    continue
                yield self._line(since, moment.at, y, is_up)
                since, is_up = moment.at, moment.kind == "restarted"
            yield self._line(since, self.until, y, is_up)

    def _line(self, since: float, until: float, y: int, is_up: bool) -> str:
        style = 'stroke="#999"' if is_up else 'stroke="#ccc" stroke-dasharray="2 5"'
        return f'<line x1="{self._x(since)}" y1="{y}" x2="{self._x(until)}" y2="{y}" {style}/>'

    def _arrows(self) -> Iterator[str]:
        for moment in self.moments:
            if moment.kind == "saw" and moment.what.at >= self.since:
                change: Change = moment.what
                yield (
                    f'<line x1="{self._x(change.at)}" y1="{self._y(change.agent)}" '
                    f'x2="{self._x(moment.at)}" y2="{self._y(moment.agent)}" '
                    f'stroke="{self._color(change.agent)}" stroke-opacity="0.35"/>'
                )

    def _points(self) -> Iterator[str]:
        free_from = dict.fromkeys(self.names, 0.0)
        for moment in self.moments:
            if not moment.agent:
                continue
            x, y = self._x(moment.at), self._y(moment.agent)
            text = escape(_text(moment))
            tip = f"<title>{moment.at:.3f} s {escape(moment.agent)} {moment.kind} {text}</title>"
            if moment.kind in ("wrote", "saw"):
                color = self._color(moment.what.agent)
                radius = 5 if moment.kind == "wrote" else 3
                yield f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{color}">{tip}</circle>'
            else:
                mark = _MARKS[moment.kind]
                yield f'<text x="{x - 5}" y="{y + 4}" fill="#b00" font-size="14">{mark}{tip}</text>'
            if moment.kind == "wrote" and x >= free_from[moment.agent]:
                yield f'<text x="{x}" y="{y - 9}" fill="#333">{text}</text>'
                free_from[moment.agent] = x + 6.5 * len(_text(moment))

    def _scale(self, height: int) -> Iterator[str]:
        for tick in range(6):
            at = self.since + (self.until - self.since) * tick / 5
            yield f'<text x="{self._x(at) - 10}" y="{height - 8}" fill="#666">{at:.2f} s</text>'


def describe(path: str) -> str:
    """A path as people write it, such as ``plan['goal']``."""
    container, _, key = path.partition(SEPARATOR)
    kind, name = container[:1], container[1:]
    if kind == "s":
        return f"{name}[{unpack_key(key)!r}]"
    return f"{name}[{key!r}]" if key else name


def _describe_op(op: Op) -> str:
    container, _, key = op.path.partition(SEPARATOR)
    kind, name = container[:1], container[1:]
    if kind == "c":
        return f"{name} {'+' if op.amount >= 0 else '-'}= {abs(op.amount)}"
    if kind == "s":
        return f"{name}.{'discard' if op.value is None else 'add'}({unpack_key(key)!r})"
    if op.value is None:
        return f"del {describe(op.path)}"
    return f"{describe(op.path)} = {unpack(op.value)!r}"


def _text(moment: Moment) -> str:
    if moment.kind in ("wrote", "saw"):
        ops = [op for op in moment.what.ops if op.path[:1] in VIEWS]
        more = f" (+{len(ops) - 1})" if len(ops) > 1 else ""
        text = _cut(_describe_op(ops[0]), LABEL_CHARS - len(more)) if ops else "(tidied)"
        return text + more
    if moment.kind == "event":
        return repr(moment.what)
    return f"{moment.kind} {_cut(str(moment.what), 2 * LABEL_CHARS)}".rstrip()


def _cut(text: str, limit: int) -> str:
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _is_shown(moment: Moment) -> bool:
    if moment.kind in ("wrote", "saw"):
        return any(op.path[:1] in VIEWS for op in moment.what.ops)
    return moment.kind in _MARKS


_MARKS = {
    "wrote": "●",
    "saw": "○",
    "joined": "◉",
    "crashed": "✕",
    "power cut": "✕",
    "restarted": "↻",
    "partitioned": "≠",
    "healed": "=",
}
_TURNS = ("crashed", "power cut", "restarted")
_COLORS = ("#1f77b4", "#d9480f", "#2b8a3e", "#862e9c", "#0b7285", "#a61e4d", "#5c4813", "#364fc7")
_WIDTH, _LEFT, _TOP, _LANE = 960, 80, 24, 54
