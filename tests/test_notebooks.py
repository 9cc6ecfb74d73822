"""The notebooks run from top to bottom, and are kept without outputs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def run(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; return what its last line shows."""
    tree = ast.parse(source)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "cell", "exec"), names)
        return None
    exec(compile(ast.Module(tree.body[:-1], []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    for cell in cells(path):
        assert cell["outputs"] == [] and cell["execution_count"] is None


def test_documents_and_merging(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}

    shown = [run("".join(cell["source"]), names) for cell in cells(NOTEBOOKS[0])]

    assert shown[1] == ({"goal": "ship it"}, 120, {"python"})
    assert shown[2] == ("ship it today", "ship it on Friday")
    assert shown[4] == ("ship it on Friday", {})
    assert "122 tokens" in capsys.readouterr().out
    assert shown[5]._repr_svg_().startswith("<svg")
