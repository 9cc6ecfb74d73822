"""Hostile changes against whole documents: nothing crashes, hangs, panics or leaves a trace."""

from __future__ import annotations

import hostile_changes
from hostile import run_children


def test_hostile_changes_do_documents_no_harm() -> None:
    program = hostile_changes.__file__
    fates = run_children("changes", seeds=[1, 2], count=11_000, seconds=120, program=program)

    assert fates.total() >= 22_000
    assert fates["refused"] > 8_000 and fates["accepted"] > 1_000
