"""Small ICC profiles, made here: for `test_colour.py`."""

import struct
from collections.abc import Sequence

import numpy as np
from PIL import ImageCms


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A small ICC profile of a monitor: of `space`, with these tags beside those that all have."""
    text = b"made here\0"
    desc = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + b"\0" * 78
    white = b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)
    every = {b"desc": desc, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": white, **tags}
    padded = {name: value + b"\0" * (-len(value) % 4) for name, value in every.items()}
    offset, table, data = 128 + 4 + 12 * len(padded), struct.pack(">I", len(padded)), b""
    for name, value in padded.items():
        table += name + struct.pack(">II", offset + len(data), len(value))
        data += value
    size = struct.pack(">I", offset + len(data))
    head = size + b"\0\0\0\0\4\0\0\0mntr" + space + b"XYZ " + b"\0" * 12 + b"acsp" + b"\0" * 28
    return (head + fixed(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + data


def curve(gamma: float) -> bytes:
    return b"para\0\0\0\0\0\0\0\0" + fixed(gamma)


SRGB_CURVE = b"para\0\0\0\0\0\3\0\0" + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))


def rgb_profile(primaries: Sequence[Sequence[float]], tone: bytes) -> bytes:
    tags = {b"%cTRC" % name: tone for name in b"rgb"}
    tags |= {
        b"%cXYZ" % name: b"XYZ \0\0\0\0" + fixed(*xyz)
        for name, xyz in zip(b"rgb", primaries, strict=True)
    }
    return profile(b"RGB ", tags)


def cmyk_profile() -> bytes:
    """The CMYK of a press whose cyan is a dark green: (1 - ink) of each channel, as Lab."""
    grid = np.stack(np.meshgrid(*[[0.0, 1.0]] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    cyan, magenta, yellow, black = grid.T
    light = 100 * (1 - black) * (1 - 0.6 * cyan) * (1 - 0.4 * magenta) * (1 - 0.1 * yellow)
    green, warm = -60 * cyan + 60 * magenta, 30 * cyan + 80 * yellow
    lab = np.stack(
        [light / 100, (green * (1 - black) + 128) / 255, (warm * (1 - black) + 128) / 255]
    )
    numbers = (np.clip(lab.T, 0, 1) * 255).round().astype(np.uint8)
    straight = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += straight * 4 + numbers.tobytes() + straight * 3
    made = bytearray(profile(b"CMYK", {b"A2B0": table, b"A2B1": table, b"A2B2": table}))
    made[8:12], made[12:16], made[20:24] = b"\2\0\0\0", b"prtr", b"Lab "
    return bytes(made)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
DISPLAY_P3, ADOBE_RGB = rgb_profile(P3, SRGB_CURVE), rgb_profile(ADOBE, curve(2.19921875))
GREY_LINEAR = profile(b"GRAY", {b"kTRC": curve(1.0)})
