"""Ways in which the bytes of a file get damaged on a disk, at a random place."""

import random
from collections.abc import Callable


def truncated(content: bytes, source: random.Random) -> bytes:
    return content[: source.randrange(len(content))]


def zeroed(content: bytes, source: random.Random) -> bytes:
    start = source.randrange(len(content))
    length = min(len(content) - start, 64)  # the file keeps its length
    return content[:start] + bytes(length) + content[start + length :]


def flipped(content: bytes, source: random.Random) -> bytes:
    place = source.randrange(len(content))
    return (
        content[:place]
        + bytes([content[place] ^ (1 << source.randrange(8))])
        + content[place + 1 :]
    )


DAMAGE: list[Callable[[bytes, random.Random], bytes]] = [truncated, zeroed, flipped]
