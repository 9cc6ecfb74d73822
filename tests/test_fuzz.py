"""Hostile bytes, in a process that may die of them: what CI runs of `fuzz`, and its supervisor."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fuzz.__main__ import Findings, run  # noqa: E402
from fuzz.mutations import tricked  # noqa: E402

SEQUENCES = 20_000


def test_20_000_hostile_sequences_do_no_harm() -> None:
    command = [sys.executable, "-m", "fuzz", "--sequences", str(SEQUENCES)]
    campaign = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    assert campaign.returncode == 0, campaign.stdout[-5000:] + campaign.stderr[-2000:]
    numbers = dict(line.rsplit(maxsplit=1) for line in campaign.stdout.splitlines()[:-1])
    assert len(numbers) == 3 * 10
    count = {what: int(number.replace(",", "")) for what, number in numbers.items()}
    assert sum(n for what, n in count.items() if what.endswith("sequences")) >= SEQUENCES
    # Attacks that are all refused would show nothing.
    assert all(n for what, n in count.items() if what.endswith("taken in"))


@pytest.mark.parametrize(
    ("trouble", "sign"),
    [
        ("crash", "Segmentation fault"),
        ("hang", "Timeout"),
        ("panic", "PanicException: from afar"),
        ("memory", "MemoryError"),
        ("forgery", "forgery: of 9"),
    ],
)
def test_trouble_is_found_named_and_passed_over(trouble: str, sign: str) -> None:
    findings = Findings()

    run(f"trouble-{trouble}", 0, 20, findings, hang=1.0)

    (name,) = findings.found
    assert name == f"trouble-{trouble}/5"
    assert sign in findings.found[name]
    assert findings.fates[f"trouble-{trouble}: sequences"] == 20
    command = [sys.executable, "-m", "fuzz", "--replay", name]
    if trouble != "hang":
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode


def test_integers_are_written_as_yrs_would_mask_them() -> None:
    made = {tricked(b"\x07", 0, random.Random(seed)) for seed in range(200)}

    assert b"\x87\x80\x80\x80\x80\x80\x80\x10" in made  # 2**53 + 7
    assert b"\x87\x80\x80\x80\x10" in made  # 2**32 + 7
    assert b"\x87\x80\x80\x00" in made
