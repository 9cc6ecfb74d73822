"""
The work of the demo: what is in a tree of Python source.

`survey` does it in one process. The agents do it together: each summarises the files that the hash
of the name gives it (`owner`) and records them in a shared document (`record`). `read` gets the
sum of their work back out of a document; `differences` says where two surveys are not the same.

As a program this file needs nothing but the standard library, so that it starts in no time:
``survey.py DIR`` prints the survey of one process, and ``survey.py DIR -`` summarises the files
whose names it reads, a line of JSON for each. An agent has its files parsed by such a program,
because parsing in its own process would hold up everything else there.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crdtstate.document import Document

DOCUMENT = "survey"
FILES = "files"
COUNTERS = ("files", "lines", "functions", "classes", "unparsable")
MODULES = "modules"
LARGEST = "largest"

SKIPPED = {"site-packages", "__pycache__"}
DIFFERENCES_MAX = 10


@dataclass(frozen=True, slots=True)
class Summary:
    """What is in one file. Of a file that does not parse only the lines are known."""

    lines: int
    functions: int = 0
    classes: int = 0
    modules: tuple[str, ...] = ()
    unparsable: bool = False

    def entry(self) -> dict[str, int]:
        """What the shared map says of the file."""
        return {
            "lines": self.lines,
            "functions": self.functions,
            "classes": self.classes,
            "imports": len(self.modules),
        }


@dataclass(slots=True)
class Survey:
    """What is in a tree.

    Attributes:
        files: The entry of each file, by its name relative to the root.
        counters: Totals, by the names in `COUNTERS`.
        modules: The top-level modules that are imported anywhere.
        largest: The file with the most lines: [lines, name].
    """

    files: dict[str, dict[str, int]] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    modules: list[str] = field(default_factory=list)
    largest: list[Any] | None = None


def names(root: Path) -> list[str]:
    """The Python files under *root*, in the same order everywhere."""
    return sorted(_walk(root))


def _walk(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        for name in files:
            path = Path(folder, name)
            if path.suffix == ".py" and path.is_file():
                yield path.relative_to(root).as_posix()


def owner(name: str, agents: int) -> int:
    """Which of the agents 0, 1, ... has the file *name*."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") % agents


def summarise(path: Path) -> Summary:
    """Read and parse a file."""
    source = path.read_bytes()
    lines = len(source.splitlines())
    try:
        with warnings.catch_warnings():
            # The source's own mistakes, such as invalid escapes.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Summary(lines, unparsable=True)
    functions = classes = 0
    modules: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                functions += 1
            case ast.ClassDef():
                classes += 1
            case ast.Import():
                modules.update(alias.name.partition(".")[0] for alias in node.names)
            case ast.ImportFrom(module=str(module), level=0):
                modules.add(module.partition(".")[0])
    return Summary(lines, functions, classes, tuple(sorted(modules)))


def survey(root: Path) -> Survey:
    """Survey a tree in this process, without any replica."""
    found = Survey()
    modules: set[str] = set()
    for name in names(root):
        summary = summarise(root / name)
        found.files[name] = summary.entry()
        for counter, count in _counts(summary):
            found.counters[counter] += count
        modules.update(summary.modules)
        found.largest = max(found.largest or [-1, ""], [summary.lines, name])
    found.modules = sorted(modules)
    return found


def _counts(summary: Summary) -> Iterable[tuple[str, int]]:
    yield "files", 1
    yield "lines", summary.lines
    yield "functions", summary.functions
    yield "classes", summary.classes
    yield "unparsable", int(summary.unparsable)


# In a shared document


def record(document: Document, name: str, summary: Summary) -> None:
    """Add one file to the shared survey; to be called in a transaction."""
    document.map(FILES)[name] = summary.entry()
    for counter, count in _counts(summary):
        document.counter(counter).increment(count)
    document.set(MODULES).update(summary.modules)
    largest = document.register(LARGEST, strategy="max")
    mine = [summary.lines, name]
    if not largest.is_set or mine > largest.value:
        largest.value = mine


def read(document: Document) -> Survey:
    """The shared survey, as this replica sees it."""
    return Survey(
        dict(document.map(FILES)),
        {counter: document.counter(counter).value for counter in COUNTERS},
        sorted(document.set(MODULES)),
        document.register(LARGEST).value,
    )


def differences(wanted: Survey, found: Survey) -> list[str]:
    """Where *found* is not what was *wanted*, in words; empty if it is exactly that."""
    said = [
        *_differing("file", wanted.files, found.files),
        *_differing("counter", wanted.counters, found.counters),
        *_differing("module", dict.fromkeys(wanted.modules, 1), dict.fromkeys(found.modules, 1)),
    ]
    if wanted.largest != found.largest:
        said.append(f"largest is {found.largest}, not {wanted.largest}")
    if len(said) > DIFFERENCES_MAX:
        more = len(said) - DIFFERENCES_MAX
        said = [*said[:DIFFERENCES_MAX], f"and {more} more differences"]
    return said


def _differing(what: str, wanted: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    for key in sorted(wanted.keys() | found.keys()):
        if key not in found:
            yield f"{what} {key} is missing"
        elif key not in wanted:
            yield f"{what} {key} is too many"
        elif wanted[key] != found[key]:
            yield f"{what} {key} is {found[key]}, not {wanted[key]}"


# As a program


def main() -> None:
    """Survey a tree, or summarise files by name; end when standard input does."""
    root = Path(sys.argv[1])
    if sys.argv[2:] == ["-"]:
        for line in sys.stdin:
            summary = asdict(summarise(root / json.loads(line)))
            print(json.dumps(summary), flush=True)
        return

    def end_with_stdin() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=end_with_stdin, daemon=True).start()
    json.dump(asdict(survey(root)), sys.stdout)


if __name__ == "__main__":
    main()
