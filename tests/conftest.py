"""
Fixtures for every test module: one of each server, of each process that runs tests.

With ``-n`` tests run in several processes; ``--dist loadfile`` leaves those of one file together
and in order, as some tell one story with one fixture.
"""

import atexit
import gc
import os
import shutil
import tempfile

from hypothesis import settings
from pytest import Item
from servers import bucket, redis_server, s3_credentials, s3_server

__all__ = ["bucket", "redis_server", "s3_credentials", "s3_server"]

# How fast something is is not a matter of tests, least of all beside others.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# The host's secret is one for all tests, of whatever process, and not that of who runs them.
if "CRDTSTATE_TESTS" not in os.environ:
    folder = tempfile.mkdtemp(prefix="crdt-")
    os.environ["CRDTSTATE_TESTS"] = os.environ["XDG_STATE_HOME"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

LONGEST = (
    "test_simulation.py",
    "test_recovery.py",
    "test_controller.py",
    "test_controller_kill.py",
)
"""They begin first, or one process is left with them when the others have nothing to do."""


def pytest_collection_finish() -> None:
    """Let Python's collector leave out what thousands of tests and the libraries of all front doors
    are made of: to go through it took half a second each time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[Item]) -> None:
    """Let the longest files begin first; all else stays in order."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
