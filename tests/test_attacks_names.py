"""A69 of the threat model: names that look like paths, or cannot be shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from crdtstate import Replica, UsageError
from crdtstate.change import Origin, decode_change, encode_change
from crdtstate.clock import Dot
from crdtstate.errors import InvalidUpdate
from tests.harness import asynchronous

PATHS = ["../../etc/passwd", "/etc/x", "a/../b", "con", "..", "C:\\x", "~/.ssh/id", "%2e%2e/x"]
UNPRINTABLE = ["a\0b", "two\nlines", "\u202egnp.exe", "\x1b[2J", "x" * 300, ""]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@asynchronous
async def test_a_name_is_never_a_path(tmp_path: Path) -> None:
    """Names of documents, agents and labels are text, in rows and keys and nowhere else."""
    home = tmp_path / "home"
    home.mkdir()
    before = names_in(Path("/etc"))
    for agent in ("../ann", "/ann"):
        async with Replica(
            agent,
            store=home / "store.db",
            checkpoints=[f"sqlite:///{home}/tier.db"],
        ) as replica:
            for name in PATHS:
                replica.document(name).map(name)[name] = name
            await replica.checkpoint("../label")
            assert {name for name in replica.documents() if not name.startswith("@")} == {*PATHS}
        assert names_in(tmp_path) == ["home"]
        assert {name.split(".")[0] for name in names_in(home)} == {"store", "tier"}
    assert names_in(Path("/etc")) == before


@pytest.mark.parametrize("name", UNPRINTABLE)
@asynchronous
async def test_a_name_that_cannot_be_shown_is_refused(name: str) -> None:
    async with Replica("ann") as ann:
        for attempt in (ann.document, ann.map, ann.counter):
            with pytest.raises(UsageError):
                attempt(name)
    made = encode_change(name, Dot(7, 1), {}, 1, 0, False, b"\0\0", Origin("ann"))
    with pytest.raises(InvalidUpdate, match="name"):
        decode_change(made.data)
