"""Files that lie: headers that promise what isn't there, and mutations of good containers."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

from media_files import Kind, shots, write

GIANT_RAW = b"YUV4MPEG2 W65535 H65535 F25:1 Ip A1:1 C420jpeg\nFRAME\n" + bytes(100_000)
RATELESS_RAW = b"YUV4MPEG2 W64 H64 F0:0 Ip A1:1 C420jpeg\n" + (b"FRAME\n" + bytes(6144)) * 10


KINDS = [
    Kind(b_frames=2),
    Kind(suffix="mkv"),
    Kind(suffix="ts"),
    Kind(suffix="mpg", codec="mpeg2video"),
    Kind(suffix="avi", codec="mpeg4"),
]


def boxes(data: bytes, name: bytes) -> list[int]:
    """Where a word stands in a file."""
    places, at = [], data.find(name)
    while at >= 0:
        places.append(at)
        at = data.find(name, at + 1)
    return places


def lies(data: bytes) -> dict[str, bytes]:
    """An MP4 file whose boxes say 65535 × 65535 pixels, 10^9 frames, or that no time passes between frames."""
    giant, many, still = bytearray(data), bytearray(data), bytearray(data)
    for at in boxes(data, b"avc1"):
        if data[at - 4 : at - 2] == b"\0\0":
            giant[at + 28 : at + 32] = struct.pack(">HH", 65535, 65535)
    for at in boxes(data, b"stsz"):
        many[at + 12 : at + 16] = struct.pack(">I", 1_000_000_000)
    for at in boxes(data, b"stts"):
        still[at + 16 : at + 20] = struct.pack(">I", 0)
    return {"giant": bytes(giant), "many": bytes(many), "still": bytes(still)}


def mutate(data: bytes, generator: random.Random) -> bytes:
    """`data` with flipped bits, cut off, overwritten, with a hole, or with absurd numbers in its header."""
    changed = bytearray(data)
    kind = generator.randrange(5)
    if kind == 0:  # flipped bits
        for _ in range(generator.choice([1, 10, 200])):
            at = generator.randrange(len(changed))
            changed[at] ^= 1 << generator.randrange(8)
    elif kind == 1:  # cut off
        del changed[generator.randrange(len(changed)) :]
    elif kind == 2:  # a piece overwritten with noise
        at = generator.randrange(len(changed))
        length = min(generator.choice([16, 500, 4000]), len(changed) - at)
        changed[at : at + length] = generator.randbytes(length)
    elif kind == 3:  # a piece left out
        at = generator.randrange(len(changed))
        del changed[at : at + generator.choice([1, 100, 2000])]
    else:  # big numbers where the header is, wherever it is
        for word in (b"stsz", b"stts", b"ctts", b"mvhd", b"tkhd", b"mdhd", b"avcC", b"stco"):
            for at in boxes(data, word):
                if generator.random() < 0.3:
                    place = at + 4 + 4 * generator.randrange(6)
                    changed[place : place + 4] = generator.choice(
                        [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"]
                    )
    return bytes(changed)


def write_originals(folder: Path) -> list[Path]:
    """A good file of each container: two shots of 20 frames."""
    return [write(folder / f"original{i}", list(shots([20, 20], 64, 96)), kind=k) for i, k in enumerate(KINDS)]


def mutants(originals: list[Path], count: int, seed: int) -> Iterator[bytes]:
    """`count` mutations of the originals in turn."""
    generator = random.Random(seed)
    for i in range(count):
        yield mutate(originals[i % len(originals)].read_bytes(), generator)
