"""
Which checkpoints are kept, and why.

Three limits, and a checkpoint stays while it is within all of them: so tightening one never keeps
more, and neither does time. Each is judged on its own, over all checkpoints, in one fixed order:
the newest that verifies (which always stays), those with a label, newest first, then the others,
newest first. Parts that checkpoints share count once, for the first in that order that has them.

Every manifest names all of its parts, so any checkpoint may go without harm to another. What goes
with it are the parts that no kept one names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from crdtstate.errors import UsageError
from crdtstate.manifest import Manifest

DAY = 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long checkpoints are kept. A limit that is None does not limit.

    The newest checkpoint that verifies is kept in any case.

    Raises:
        UsageError: A setting is out of its range.
    """

    count: int | None = 20
    """How many checkpoints without a label are kept, the newest."""

    age: float | None = 7 * DAY
    """For how many seconds they are kept."""

    bytes: int | None = 4 * 2**30
    """How much all of them may take in a tier, parts that they share counted once."""

    labelled: float = 10.0
    """Checkpoints with a label have limits of their own: this many times *count* and *age*. Of
    *bytes* they have the first share."""

    near: int | None = 10
    """How many of the newest stay in every tier. Older ones stay in the archive alone, where
    there is one; see `Replica`'s ``checkpoints=``."""

    def __post_init__(self) -> None:
        for name in ("count", "bytes", "near"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"Retention.{name} is a number from 1, or None, not {value!r}")
        for name, low in (("age", 0.0), ("labelled", 1.0)):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is None and name == "age":
                continue
            if not is_number or not low <= value < float("inf"):
                none = ", or None" if name == "age" else ""
                raise UsageError(f"Retention.{name} is a number from {low:g}{none}, not {value!r}")


class Held(NamedTuple):
    """A checkpoint as retention sees it.

    Attributes:
        is_verified: Whether it is known that it can be loaded.
    """

    id: str
    manifest: Manifest
    is_verified: bool


class Verdict(NamedTuple):
    """What is kept and what is not, each with the reason, by id and newest first."""

    kept: dict[str, str]
    dropped: dict[str, str]


def judge(retention: Retention, held: Iterable[Held], now_ms: int) -> Verdict:
    """Decide, at the wall time *now_ms*, which checkpoints are kept."""
    newest_first = sorted(held, key=lambda each: each.id, reverse=True)
    always = next((each for each in newest_first if each.is_verified), None)
    if always is None and newest_first:
        always = newest_first[0]
    labelled = [each for each in newest_first if each.manifest.label]
    plain = [each for each in newest_first if not each.manifest.label]
    reasons = _within_count(retention, labelled, plain)
    reasons |= _within_age(retention, newest_first, now_ms)
    ordered = sorted(
        newest_first, key=lambda each: (each is not always, not each.manifest.label)
    )  # A stable sort: newest first among equals.
    reasons |= _within_bytes(retention, ordered)
    kept: dict[str, str] = {}
    dropped: dict[str, str] = {}
    for each in newest_first:
        if each is always:
            kept[each.id] = "it is the newest that verifies"
        elif each.id in reasons:
            dropped[each.id] = reasons[each.id]
        else:
            kept[each.id] = _why_kept(retention, each, now_ms)
    return Verdict(kept, dropped)


def orphans(parts: Iterable[str], kept: Iterable[Manifest]) -> set[str]:
    """Which of *parts*, by name, no kept checkpoint has."""
    named = {name for manifest in kept for name in manifest.parts()}
    return set(parts) - named


def near(retention: Retention, ids: Iterable[str]) -> set[str]:
    """Which of the kept checkpoints stay in every tier, although the archive has them."""
    return set(sorted(ids, reverse=True)[: retention.near])


def total_bytes(manifests: Iterable[Manifest]) -> int:
    """What checkpoints take together."""
    parts = {name: part.stored for each in manifests for name, part in each.parts().items()}
    return sum(parts.values())


def limits(retention: Retention, manifest: Manifest) -> tuple[float | None, float | None]:
    """The count and the age in seconds up to which a checkpoint like this one is kept."""
    if not manifest.label:
        return retention.count, retention.age
    factor = retention.labelled
    count = None if retention.count is None else int(retention.count * factor)
    return count, None if retention.age is None else retention.age * factor


def _within_count(retention: Retention, labelled: list[Held], plain: list[Held]) -> dict[str, str]:
    found: dict[str, str] = {}
    for group in (labelled, plain):
        if not group:
            continue
        count, _ = limits(retention, group[0].manifest)
        what = "with a label " if group is labelled else ""
        if count is not None:
            for each in group[int(count) :]:
                found[each.id] = f"there are {int(count)} newer ones {what}".rstrip()
    return found


def _within_age(retention: Retention, held: list[Held], now_ms: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in held:
        _, age = limits(retention, each.manifest)
        if age is not None and now_ms - each.manifest.created_ms > 1000 * age:
            found[each.id] = f"it is older than {_span(age)}"
    return found


def _within_bytes(retention: Retention, ordered: list[Held]) -> dict[str, str]:
    found: dict[str, str] = {}
    if retention.bytes is None:
        return found
    counted: set[str] = set()
    total = 0
    for each in ordered:
        for name, part in each.manifest.parts().items():
            if name not in counted:
                counted.add(name)
                total += part.stored
        if total > retention.bytes:
            # With it, whatever comes after it in the order.
            found[each.id] = f"with it, checkpoints take more than {retention.bytes:,} bytes"
    return found


def _why_kept(retention: Retention, each: Held, now_ms: int) -> str:
    count, age = limits(retention, each.manifest)
    old = _span(max(0.0, now_ms - each.manifest.created_ms) / 1000)
    who = f"it has the label {each.manifest.label!r}: " if each.manifest.label else ""
    of_count = "" if count is None else f"it is among the newest {int(count)}, "
    of_age = "" if age is None else f", below {_span(age)}"
    return f"{who}{of_count}{old} old{of_age}"


def _span(seconds: float) -> str:
    for unit, length in (("days", DAY), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
