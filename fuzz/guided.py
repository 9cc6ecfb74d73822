"""
The decoders for atheris, guided by the coverage of their code: run by ``python -m fuzz --guided``.

The first byte chooses who reads the rest. What the guards admit goes into pycrdt as well. Arguments
are libFuzzer's, such as ``-max_total_time=60`` and a directory that keeps a corpus.
"""

from __future__ import annotations

import faulthandler
import hashlib
import random
import sys

import atheris

READ = "certificates change guard native_guard slots values wire".split()

with atheris.instrument_imports(include=[f"crdtstate.{name}" for name in READ]):
    from crdtstate import certificates, change, guard, native_guard, slots, values, wire
    from crdtstate.errors import ProtocolError, UsageError
    from crdtstate.native import Native

from fuzz.targets import TARGETS  # noqa: E402

ROOT_KEY = bytes(range(32))


def checked(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest() + data


def take_change(data: bytes) -> None:
    """The body of a change without an update."""
    empty = hashlib.blake2b(b"", digest_size=16).digest()
    body = data.replace(b"UPDATEUPDATEHASH", empty)
    head = b"\0" + hashlib.blake2b(body, digest_size=16).digest()
    change.decode_change(head + len(body).to_bytes(4, "big") + body)


def take_native(data: bytes) -> None:
    """The first change of a native document, into pycrdt."""
    native = Native(9, lambda: None)
    try:
        native.apply(data, 7)
        native.exercise()
    finally:
        native.close()


def take_value(data: bytes) -> None:
    values.check(data)
    values.unpack(data)


READERS = [
    guard.parse_change,
    guard.parse_state,
    native_guard.check_state,
    take_native,
    take_change,
    lambda data: change.Snapshot.decode(checked(data)),
    wire.decode_message,
    wire.decode_record,
    slots.Slot.decode,
    take_value,
    lambda data: certificates.decode_certificate(data, ROOT_KEY),
]


def test_one_input(data: bytes) -> None:
    """Whatever the bytes are, it is ProtocolError or nothing."""
    if not data:
        return
    try:
        READERS[data[0] % len(READERS)](data[1:])
    except (ProtocolError, UsageError):
        pass


def seeds() -> list[bytes]:
    """Honest inputs to begin with."""
    frames = TARGETS["frames"]()
    frames.begin(random.Random(0))
    native = TARGETS["native"]()
    native.begin(random.Random(0))
    guards = TARGETS["guards"]()
    guards.begin(random.Random(0))
    found = [bytes([6, wire.HEADER, 0x91]) + frame for frame in frames.frames]
    found += [b"\3" + made for _, made in native.changes] + [b"\2" + native.state]
    found += [b"\0" + made for made in guards.scene.honest] + [b"\1" + guards.scene.state]
    return found


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    faulthandler.enable()
    with tempfile.TemporaryDirectory() as corpus:
        for at, seed in enumerate(seeds()):
            (Path(corpus) / f"seed{at}").write_bytes(seed)
        atheris.Setup([*sys.argv, "-timeout=10", "-rss_limit_mb=2048", corpus], test_one_input)
        atheris.Fuzz()
