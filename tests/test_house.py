"""The architecture as a test: floors, what the lower ones must not know, and what is exported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import crdtstate

PACKAGE = Path(crdtstate.__file__).parent

# From the ground up. A module imports from its own floor and the floors below.
FLOORS = [
    {"errors", "clock", "values", "signing"},
    {
        "guard",
        "slots",
        "lane",
        "loading",
        "lanes",
        "native_guard",
        "native",
        "native_edits",
        "conflict",
        "votes",
        "change",
        "crdts",
        "document",
        "documents",
        "digests",
        "hiding",
        "withholding",
        "enforcement",
        "validators",
        "rules",
        "quarantine",
        "certificates",
        "revocations",
    },
    {
        "manifest",
        "attestation",
        "retention",
        "past",
        "history",
        "rewrite",
        "outcomes",
        "commands",
        "board",
        "judging",
        "ladder",
        "events",
        "authors",
        "forks",
        "standing",
        "limits",
        "bans",
        "handshake",
        "config",
        "wire",
        "identity",
        "outbox",
        "link",
        "tree",
        "membership",
        "topology",
        "mesh",
        "transfer",
        "leases",
        "presence",
        "quorum",
        "consistency",
        "ledger",
        "haves",
        "wants",
        "pending",
        "verdicts",
        "outgoing",
        "serving",
        "upkeep",
        "pacing",
        "comparing",
        "sync",
    },
    {"trial", "audit", "keys", "credentials", "authority", "transports", "stores", "tiers"},
    {
        "arguments",
        "glance",
        "observers",
        "saving",
        "examiner",
        "admission",
        "connections",
        "borrowing",
        "cutting",
        "shelf",
        "catalogue",
        "tending",
        "checkpoints",
        "announcements",
        "casebook",
        "recovery",
        "recovering",
        "adoption",
        "lookback",
        "keeping",
        "resolving",
        "waiting",
        "verbs",
        "dispatch",
        "sharing",
        "obeying",
        "revoking",
        "replica",
    },
    {
        "reports",
        "system",
        "controller",
        "blocking",
        "relay",
        "simulation",
        "integrations",
        "demo",
        "cli",
        "__main__",
    },
]

# What floors 0 to 2 must not import: they take time, chance and bytes as arguments.
WORLD = {"asyncio", "socket", "ssl", "threading", "time", "os", "logging", "pathlib", "subprocess"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The module or subpackage of crdtstate that a file belongs to."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The modules a file imports when it runs, as (name, whether it is ours)."""
    tree = ast.parse(path.read_text())
    checked_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in checked_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "crdtstate":
            names = [f"crdtstate.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            names = [node.module or ""]
        else:
            continue
        for name in names:
            parts = name.split(".")
            ours = parts[0] == "crdtstate" and len(parts) > 1
            yield (parts[1] if ours else parts[0]), ours


LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def test_every_module_has_a_floor() -> None:
    rooms = {room(path) for path in MODULES} - {"__init__"}

    assert rooms <= LEVEL.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    if room(path) == "__init__":
        return
    for name, ours in imports(path):
        if ours and name in LEVEL:
            assert LEVEL[name] <= LEVEL[room(path)], f"{path.name} imports {name}"
        if not ours and LEVEL[room(path)] <= 2:
            assert name not in WORLD, f"{path.name} is on a pure floor and imports {name}"


def test_only_the_engines_import_pycrdt() -> None:
    found = {room(path) for path in MODULES if ("pycrdt", False) in set(imports(path))}

    assert found == {"lanes", "native"}


def test_every_module_says_what_it_is() -> None:
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_every_public_name_is_documented_and_sorted() -> None:
    assert crdtstate.__all__ == sorted(crdtstate.__all__)
    for name in crdtstate.__all__:
        assert getattr(crdtstate, name).__doc__, f"{name} has no docstring"


def test_public_methods_say_what_they_do() -> None:
    for name in crdtstate.__all__:
        thing = getattr(crdtstate, name)
        if not isinstance(thing, type):
            continue
        for attribute, value in vars(thing).items():
            if attribute.startswith("_") or not callable(value):
                continue
            known = any(
                getattr(getattr(b, attribute, None), "__doc__", None) for b in thing.__mro__
            )
            assert known, f"{name}.{attribute} has no docstring"
