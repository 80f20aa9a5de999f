"""Text detection with rapidocr's DB network, whose weights ship inside its wheel.

The paper runs CRAFT (svd/curation/text/craft.py) on the first, middle and last frame. It drops the quarter of clips
with the most text (E.2.2) or all clips above 7 % (App. C). This detector needs no download. The rules below were tuned
so that it finds little text on clean frames.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import cv2
import numpy as np

from svd.core.errors import UserError
from svd.curation.text.base import MEAN, MULTIPLE, STD

BINARY_THRESHOLD = 0.3
UNCLIP_RATIO = 1.6
MIN_SIDE = 3.0
# A text line is at least this many times longer than high. False detections on clean frames mostly are not: faces,
# buttons and patterned shapes look like one big character. The price is that lone characters are missed.
ELONGATION = 2.0
# A text line is at most this share of the frame high.
MAX_HEIGHT = 0.6
# The map fades over a few pixels around a line, so the mean inside grows with the height of the line: from about 0.75
# at 15 pixels of the map to over 0.9 at 130. Wide soft blobs (skies, faces, animals in a row) stay below that. Between
# these heights the required score rises from the configured one to that of large letters.
RISING_SCORE = (16.0, 96.0)
LARGE_SCORE = 0.88
# Written lines are mostly level. Upright or tilted detections (faces, facades, hands) count only if they are longer.
MAX_TILT = 5.0  # degrees
TILTED_ELONGATION = 6.0
# Normalised value of each of the 256 levels, per channel: (3, 256).
NORMALISED = ((np.arange(256, dtype=np.float32) / 255 - MEAN[:, None]) / STD[:, None]).astype(np.float32)


class DBTextDetector:
    """rapidocr's PP-OCRv6 detector (differentiable binarisation) in onnxruntime, on one thread.

    Frames are resized to multiples of 32 pixels and about the area of `width` × `height`, whatever their aspect:
    rapidocr's defaults take several times as long and find text in skies and animals. Smaller frames are enlarged at
    most `max_upscale` times, so that small videos cost little.
    """

    def __init__(
        self, width: int = 704, height: int = 384, box_threshold: float = 0.5, max_upscale: float = 1.0
    ) -> None:
        import onnxruntime  # here: only decoding processes pay for its memory

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        # A memory plan would be kept per frame size: 20 MB more after fifty sizes, and no faster.
        options.enable_mem_pattern = False
        self._session = onnxruntime.InferenceSession(
            str(_rapidocr_model()), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        self.width, self.height = width, height
        self.box_threshold = box_threshold
        self.max_upscale = max_upscale

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of the network's input for a frame of this size; multiples of 32."""
        scale = min(math.sqrt(self.width * self.height / (width * height)), self.max_upscale)
        return _multiple(height * scale), _multiple(width * scale)

    def probability(self, frame: np.ndarray) -> np.ndarray:
        """Return the text probability (h, w) float32 in [0, 1] of an (H, W, 3) uint8 RGB frame, at `input_size`."""
        height, width = self.input_size(*frame.shape[:2])
        shrinking = height * width < frame.shape[0] * frame.shape[1]
        resized = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)
        # The network was trained on BGR images, but with ImageNet's RGB statistics in that channel order.
        batch = np.empty((1, 3, height, width), np.float32)
        for plane, table, out in zip(reversed(cv2.split(resized)), NORMALISED, batch[0], strict=True):
            cv2.LUT(plane, table, out)
        return self._session.run(None, {self._input: batch})[0][0, 0]

    def polygons(self, frame: np.ndarray) -> list[np.ndarray]:
        """Return text polygons (4, 2) in pixels of `frame` (H, W, 3) uint8 RGB."""
        probability = self.probability(frame)
        scale = np.array([frame.shape[1] / probability.shape[1], frame.shape[0] / probability.shape[0]], np.float32)
        mask = cv2.dilate((probability > BINARY_THRESHOLD).astype(np.uint8), np.ones((2, 2), np.uint8))
        contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
        found = []
        for contour in contours:
            rectangle = cv2.minAreaRect(contour)
            line = _unclip(rectangle)
            if _is_line(rectangle) and self._is_sure(probability, contour, min(line[1])):
                found.append(cv2.boxPoints(line) * scale)
        return found

    def _is_sure(self, probability: np.ndarray, contour: np.ndarray, line_height: float) -> bool:
        """Say whether the map (h, w) is as sure inside a contour as in written lines of this height in pixels."""
        if line_height > MAX_HEIGHT * len(probability):
            return False
        wanted = np.interp(line_height, RISING_SCORE, (self.box_threshold, LARGE_SCORE))
        return bool(_score(probability, contour) >= wanted)


def _rapidocr_model() -> Path:
    """Find the weights inside rapidocr's wheel; its code is not imported, because that would start three sessions."""
    spec = importlib.util.find_spec("rapidocr")
    if spec is None or spec.origin is None:
        raise UserError("text detection needs the package rapidocr (its weights): pip install it")
    return Path(spec.origin).parent / "models" / "PP-OCRv6_det_small.onnx"


def _multiple(value: float) -> int:
    """Round to a multiple of 32, at least 32."""
    return max(1, round(value / MULTIPLE)) * MULTIPLE


def _is_line(rectangle: tuple) -> bool:
    """Say whether a rectangle (centre, size, angle) has the shape of a text line."""
    _, (width, height), angle = rectangle
    short, long = sorted((width, height))
    slope = (angle + (90 if height > width else 0)) % 180  # of the longer side
    tilted = min(slope, 180 - slope) > MAX_TILT
    return bool(short >= MIN_SIDE and long >= (TILTED_ELONGATION if tilted else ELONGATION) * short)


def _score(probability: np.ndarray, contour: np.ndarray) -> float:
    """Return the mean probability inside a contour."""
    x, y, width, height = cv2.boundingRect(contour)
    inside = np.zeros((height, width), np.uint8)
    cv2.fillPoly(inside, [contour - np.array([x, y], contour.dtype)], 1)
    return float(cv2.mean(probability[y : y + height, x : x + width], inside)[0])


def _unclip(rectangle: tuple) -> tuple:
    """Grow a rectangle (centre, size, angle) by area × ratio / perimeter per side: DB is trained on shrunk text."""
    centre, (width, height), angle = rectangle
    distance = width * height * UNCLIP_RATIO / (2 * (width + height))
    return centre, (width + 2 * distance, height + 2 * distance), angle
