"""The supervisor: see `fuzz`."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.util
import mmap
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz import ROOT

MEMORY = 2 << 30
"""Bytes of address space of a child: ten times what it needs."""

HANG = 20.0
"""Seconds that one block of sequences may take; usually it is a twentieth of one."""

FOUND_MAX = 5
"""Findings after which a target is left."""

FINDING = 3
"""The exit code of a child that found something wrong itself."""


_ENV = {**os.environ, "PYTHONHASHSEED": "0"}


@dataclass
class Findings:
    """What the children did, and what was found, by the name of the sequence."""

    fates: Counter[str] = field(default_factory=Counter)
    found: dict[str, str] = field(default_factory=dict)


def run(target: str, first: int, count: int, findings: Findings, hang: float = HANG) -> None:
    """Have children run sequences of a target. One that dies, or hangs for so many seconds, is
    followed by another, after the sequence it died of."""
    end = first + count
    while first < end:
        with tempfile.NamedTemporaryFile() as file:
            file.write(bytes(64))
            file.flush()
            order = [target, str(first), str(end), file.name, str(hang)]
            command = [sys.executable, "-m", "fuzz", "--child", *order]
            child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_ENV)
            at, tried, taken = struct.unpack_from("<QQQ", Path(file.name).read_bytes())
        findings.fates[f"{target}: sequences"] += at - first + (child.returncode != 0)
        findings.fates[f"{target}: inputs"] += tried
        findings.fates[f"{target}: taken in"] += taken
        if child.returncode == 0:
            return
        what = "finding" if child.returncode == FINDING else f"exit code {child.returncode}"
        findings.found[f"{target}/{at}"] = f"{what}\n{child.stderr[-3000:]}"
        first = at + 1
        if sum(name.startswith(f"{target}/") for name in findings.found) >= FOUND_MAX:
            return


def work(target: str, first: int, end: int, path: str, hang: float) -> None:
    """A child: run sequences, and note in a file which is next, as it may be the last."""
    from fuzz.targets import TARGETS

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    with open(path, "r+b") as file:
        note = mmap.mmap(file.fileno(), 64)
    attack = TARGETS[target]()
    armed = time.monotonic() - hang
    for number in range(first, end):
        note[:24] = struct.pack("<QQQ", number, attack.tried, attack.taken)
        if time.monotonic() - armed > hang / 10:
            armed = time.monotonic()
            faulthandler.dump_traceback_later(hang, exit=True)
        try:
            attack.run(number)
        except BaseException:
            # PanicException is none of Exception's.
            import traceback

            traceback.print_exc()
            with contextlib.suppress(BaseException):
                print("last input:", attack.last.hex()[:100_000], file=sys.stderr, flush=True)
            raise SystemExit(FINDING) from None
    note[:24] = struct.pack("<QQQ", end, attack.tried, attack.taken)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Hostile bytes.")
    parser.add_argument("targets", nargs="*", help="which targets (default: all)")
    parser.add_argument("--sequences", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0, help="where the numbers begin")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after about that")
    parser.add_argument("--replay", metavar="TARGET/NUMBER", help="run one sequence, here")
    parser.add_argument("--guided", type=int, metavar="SECONDS", help="with atheris")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        target, first, end, path, hang = options.child
        work(target, int(first), int(end), path, float(hang))
        return
    if options.replay:
        _replay(options.replay)
        return
    if options.guided:
        raise SystemExit(_guide(options.guided))
    findings = campaign(options.targets, options.sequences, options.seed, options.seconds)
    if findings.found:
        raise SystemExit(1)


def campaign(targets: list[str], sequences: int, seed: int, seconds: float) -> Findings:
    """Run that many sequences, dealt out over the targets by their shares."""
    from fuzz.targets import SHARES

    chosen = targets or list(SHARES)
    total = sum(SHARES[target] for target in chosen)
    findings = Findings()
    began = time.monotonic()
    # In rounds, so that a campaign that is stopped has tried all of them.
    rounds = max(1, sequences // 50_000)
    first = seed
    for _ in range(rounds):
        for target in chosen:
            count = -(-sequences * SHARES[target] // (total * rounds))
            if time.monotonic() - began < seconds:
                run(target, first, count, findings)
        first += sequences
    took = time.monotonic() - began
    done = sum(n for what, n in findings.fates.items() if what.endswith("sequences"))
    for what, number in sorted(findings.fates.items()):
        print(f"{what:30} {number:>10,}")
    print(f"{done:,} sequences in {took:.0f} s ({done / took:,.0f} a second), seed {seed}")
    for name, what in findings.found.items():
        print(f"FOUND: python -m fuzz --replay {name}\n{what}")
    return findings


def _replay(name: str) -> None:
    from fuzz.targets import TARGETS

    target, _, number = name.partition("/")
    attack = TARGETS[target]()
    faulthandler.enable()
    faulthandler.dump_traceback_later(HANG, exit=True)
    try:
        attack.run(int(number))
    finally:
        print("last input:", attack.last.hex())
    print(f"nothing found: {attack.tried} inputs, {attack.taken} taken in")


def _guide(seconds: int) -> Any:
    if importlib.util.find_spec("atheris") is None:
        print("coverage-guided fuzzing needs atheris: pip install 'crdtstate[fuzz]'")
        return 0
    command = [sys.executable, "-m", "fuzz.guided", f"-max_total_time={seconds}"]
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    main()
