"""Bytes made wrong in the ways that parsers get wrong. Owns no target; one seed gives one sequence."""

import random

TOKENS = (
    b"\x00", b"\xff" * 8, b"-1", b"9" * 40, b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b"\xed\xa0\x80",
    b"\xf0\x9f\x92\xa9", b"${port.http}", b"../../etc/passwd", b"&a [*a, *a]", b"!!python/object:os.system", b"%s%n",
    b"\r\n\r\n", b"\n" * 50, b" " * 500, b"[" * 300, b"{" * 300, b"a" * 5000, b"-0", b"18446744073709551616",
)  # fmt: skip


def mutated(sample: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """`sample` with one to four changes; now and then bytes that were never anything."""
    if rng.random() < 0.02:
        return rng.randbytes(rng.randrange(200))
    found = bytearray(sample)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(found) + 1)
        end = min(len(found), at + rng.choice((1, 1, 2, 4, 16, 64)))
        match rng.randrange(7):
            case 0:
                del found[at:end]
            case 1:
                found[at:at] = rng.choice(TOKENS)
            case 2:
                found[at:end] = rng.choice(TOKENS)
            case 3 if found:
                found[min(at, len(found) - 1)] ^= 1 << rng.randrange(8)
            case 4:
                found[at:at] = found[at:end] * rng.randint(1, 8)
            case 5:
                other = rng.choice(others)
                cut = rng.randrange(len(other) + 1)
                found[at:end] = other[cut : cut + rng.randrange(1, 200)]
            case _:
                found[at:end] = rng.randbytes(end - at)
    return bytes(found)
