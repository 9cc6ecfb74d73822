"""
Honest bytes, damaged: what a fuzzer does to inputs that it does not understand, and tricks with
variable-length integers, which yrs masks without a word (2**53 + n is client n, 2**32 is clock 0).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from crdtstate.guard import encode_varint

INTERESTING = [0, 1, 2, 7, 8, 9, 127, 128, 255, 256, 2**14, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
INTERESTING += [2**32, 2**53 - 1, 2**53, 2**53 + 7, 2**62, 2**63, 2**64 - 1]


def mutated(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Damage *data* in one to three ways; *others* are what pieces are taken from."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = _once(data, others, rng)
    return data


def _once(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    if not data:
        return rng.randbytes(rng.randrange(1, 9))
    at = rng.randrange(len(data))
    end = min(len(data), at + rng.choice((1, 2, 4, 8, 30)))
    match rng.randrange(11):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF))]) + data[at + 1 :]
        case 2:
            return data[:at] + rng.randbytes(end - at) + data[end:]
        case 3:
            return data[:at]
        case 4:
            return data[:at] + data[end:]
        case 5:
            return data[:end] + data[at:end] * rng.choice((1, 1, 3)) + data[end:]
        case 6:
            other = rng.choice(others) if others else data
            start = rng.randrange(len(other) + 1)
            return data[:at] + other[start : start + rng.randrange(60)] + data[end:]
        case 7:
            other = rng.choice(others) if others else data
            return data[:at] + other[min(at, len(other)) :]
        case _:
            return tricked(data, at, rng)


def tricked(data: bytes, at: int, rng: random.Random) -> bytes:
    """Write the variable-length integer that may stand at *at* otherwise: as another that yrs takes
    for the same, or longer than it has to be, or as an interesting one."""
    number, shift, end = 0, 0, at
    while end < len(data) and shift <= 63:
        number |= (data[end] & 127) << shift
        shift += 7
        end += 1
        if data[end - 1] < 128:
            break
    match rng.randrange(5):
        case 0:
            new = encode_varint(number + 2**53)
        case 1:
            new = encode_varint(number + 2**32)
        case 2:
            new = data[at : end - 1] + bytes([data[end - 1] | 0x80]) + b"\x80" * 2 + b"\0"
        case 3:
            new = encode_varint(max(0, number + rng.choice((-1, 1))))
        case _:
            new = encode_varint(rng.choice(INTERESTING))
    return data[:at] + new + data[end:]
