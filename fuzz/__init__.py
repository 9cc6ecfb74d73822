"""
Hostile bytes by the million, against all that reads bytes of others.

A *target* is something that takes bytes: the guard and the documents behind it, decoders of frames,
changes, snapshots, certificates. A *sequence* is a few hostile inputs, one after the other, against
one of them. Each follows from its number alone, so whatever is found can be had again:

    python -m fuzz                          # a million sequences, about half an hour
    python -m fuzz --sequences 20000        # what CI runs
    python -m fuzz --replay lanes/4711      # one of them, in this process
    python -m fuzz --guided 300             # seconds of coverage-guided fuzzing (needs atheris)

Sequences run in a child process, which may die of them. The parent sees a crash, a panic, a hang,
too much memory, and what a target itself finds wrong: above all a *forgery*, a change that was
taken in and altered more than its writer may. Every finding becomes a test with its bytes.

    mutations   honest bytes, damaged
    targets     what is attacked, and what must hold afterwards
    guided      the same decoders for atheris
    __main__    the supervisor
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Histories and honest bytes are made by what the tests make them by.
sys.path[:0] = [str(ROOT / "tests")]
