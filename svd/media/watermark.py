"""An invisible watermark in generated frames, readable by the `dwtDct` decoder of the invisible-watermark package.

That decoder takes the Haar approximation band of the blue-difference channel U in blocks of 4 x 4 coefficients (8 x 8
pixels). Block n carries bit n mod L. The bit is 1 when the largest coefficient, leaving out the first, lies in the
upper half of a quantisation step of 36. The package's encoder moves that single coefficient, which H.264 smooths away
(measured at crf 18: fewer than half of the bits are read correctly). Here the whole block is shifted, which the same
decoder reads and the codec keeps. Brightness doesn't change. Frames are (T, H, W, 3) uint8 RGB.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from svd.core.errors import UserError

Frames = NDArray[np.uint8]

MESSAGE = b"svdgen"  # 48 bits, like the released scripts' message, but not theirs

_STEP = 36.0
_PIXELS = 8
_COEFFICIENTS = 4


def _bits(message: bytes) -> NDArray[np.uint8]:
    return np.unpackbits(np.frombuffer(message, np.uint8))


def _blocks(band: NDArray[np.float64]) -> NDArray[np.float64]:
    """Split a band (4 a, 4 b) into blocks (a * b, 16), row by row."""
    rows, columns = (side // _COEFFICIENTS for side in band.shape)
    split = band.reshape(rows, _COEFFICIENTS, columns, _COEFFICIENTS)
    return split.transpose(0, 2, 1, 3).reshape(rows * columns, _COEFFICIENTS**2)


def _band(blocks: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    rows, columns = (side // _COEFFICIENTS for side in shape)
    split = blocks.reshape(rows, columns, _COEFFICIENTS, _COEFFICIENTS)
    return split.transpose(0, 2, 1, 3).reshape(shape)


def _approximation(channel: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the Haar approximation, half the sum of each 2 x 2 pixels, of the part that whole blocks cover."""
    height, width = (side // _PIXELS * _PIXELS for side in channel.shape)
    cells = channel[:height, :width].astype(np.float64).reshape(height // 2, 2, width // 2, 2)
    return cells.sum((1, 3)) / 2


def _capacity(frames: Frames, bits: int) -> int:
    blocks = (frames.shape[1] // _PIXELS) * (frames.shape[2] // _PIXELS)
    if blocks < bits:
        raise UserError(
            f"frames of {frames.shape[1]}x{frames.shape[2]} hold {blocks} marks of 8x8 pixels, fewer than the {bits} "
            "bits of the watermark; use larger frames or no watermark"
        )
    return blocks


def embed(frames: Frames, message: bytes = MESSAGE) -> Frames:
    """Return a copy of the frames (T, H, W, 3) that carries `message`; raises UserError when they are too small."""
    bits = _bits(message)
    pattern = bits[np.arange(_capacity(frames, len(bits))) % len(bits)]
    return np.stack([_embed_frame(frame, pattern) for frame in frames])


def _embed_frame(frame: Frames, pattern: NDArray[np.uint8]) -> Frames:
    yuv = np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2YUV), np.uint8)
    band = _approximation(yuv[..., 1])
    blocks = _blocks(band)
    largest = blocks[:, 1:].max(1)
    offset = 0.25 + 0.5 * pattern
    wanted = (np.round(largest / _STEP - offset).clip(0) + offset) * _STEP
    blocks += (wanted - largest)[:, None]
    # The inverse Haar transform spreads half of a coefficient's change to each of its four pixels.
    change = np.kron((_band(blocks, band.shape) - band) / 2, np.ones((2, 2)))
    height, width = change.shape
    yuv[:height, :width, 1] = np.clip(np.round(yuv[:height, :width, 1] + change), 0, 255)
    return cv2.cvtColor(yuv, cv2.COLOR_YUV2RGB).astype(np.uint8)


def read(frames: Frames, length: int = len(MESSAGE)) -> bytes:
    """Read the `length` bytes that the frames carry, by majority over all blocks of all frames.

    Frames without a watermark give arbitrary bytes: compare with the expected message. Raises UserError when the frames
    are too small.
    """
    _capacity(frames, 8 * length)
    votes = np.zeros(8 * length)
    counts = np.zeros(8 * length)
    for frame in frames:
        blocks = _blocks(_approximation(cv2.cvtColor(frame, cv2.COLOR_RGB2YUV)[..., 1]))
        value = blocks[:, 1:].max(1)
        index = np.arange(len(blocks)) % (8 * length)
        np.add.at(votes, index, value % _STEP > _STEP / 2)
        np.add.at(counts, index, 1)
    return np.packbits(votes / counts > 0.5).tobytes()
