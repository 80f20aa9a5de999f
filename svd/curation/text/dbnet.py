"""Text detection: which share of a clip's frames is covered by written text (App. C, Fig. 15).

The paper runs CRAFT on the first, middle and last frame. Here a detector is anything that turns a frame into polygons:
rapidocr's DB network, whose weights ship inside its wheel, or CRAFT itself (svd/curation/text/craft.py) when its
weights are given. The score is the area of the *union* of the polygons, the median of the three frames (what at
least two of them show); the paper: drop the quarter
with the most text (E.2.2) or everything above 7 % (App. C).
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
# A line of text is longer than high. What the network takes for text on clean frames is mostly not: faces, buttons,
# patterned shapes look to it like one big character. Lone characters are given up for that.
ELONGATION = 2.0
# Nor is it higher than this share of the frame.
MAX_HEIGHT = 0.6
# The map fades over a few pixels around a line, so the mean inside grows with the line's height: from about 0.75 at 15
# pixels of the map to over 0.9 at 130. Wide soft blobs (skies, faces, animals in a row) don't come up to that. Between
# these heights the least score rises from the configured one to that of large letters.
RISING_SCORE = (16.0, 96.0)
LARGE_SCORE = 0.88
# Written lines are level. What stands upright or at an angle (faces, facades, hands) must be a longer line to count.
MAX_TILT = 5.0  # degrees
TILTED_ELONGATION = 6.0
# What the network takes for each level of its three channels: (3, 256).
NORMALISED = ((np.arange(256, dtype=np.float32) / 255 - MEAN[:, None]) / STD[:, None]).astype(np.float32)


class DBTextDetector:
    """rapidocr's PP-OCRv6 detector (differentiable binarisation) through onnxruntime, on one thread.

    Frames are resized here to multiples of 32 pixels and about the area of `width` × `height`, whatever their aspect:
    rapidocr's own defaults take several times as long and find text in skies and animals. Smaller frames are enlarged
    at most `max_upscale` times, so that small videos cost little.
    """

    def __init__(
        self, width: int = 704, height: int = 384, box_threshold: float = 0.5, max_upscale: float = 1.0
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        # A plan of the memory would be kept for each size of frames: 20 MB more after fifty sizes, and no faster.
        options.enable_mem_pattern = False
        self._session = onnxruntime.InferenceSession(
            str(_rapidocr_model()), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        self.width, self.height = width, height
        self.box_threshold = box_threshold
        self.max_upscale = max_upscale

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which a frame of this size is looked at; multiples of 32."""
        scale = min(math.sqrt(self.width * self.height / (width * height)), self.max_upscale)
        return _multiple(height * scale), _multiple(width * scale)

    def probability(self, frame: np.ndarray) -> np.ndarray:
        """Text probability (h, w) float32 in [0, 1] of an (H, W, 3) uint8 RGB frame, at the size of `input_size`."""
        height, width = self.input_size(*frame.shape[:2])
        shrinking = height * width < frame.shape[0] * frame.shape[1]
        resized = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)
        # The network was trained on BGR pictures with ImageNet's statistics in this channel order.
        batch = np.empty((1, 3, height, width), np.float32)
        for plane, table, out in zip(reversed(cv2.split(resized)), NORMALISED, batch[0], strict=True):
            cv2.LUT(plane, table, out)
        return self._session.run(None, {self._input: batch})[0][0, 0]

    def polygons(self, frame: np.ndarray) -> list[np.ndarray]:
        """Text polygons in pixels of `frame` (H, W, 3) uint8 RGB."""
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
        """Whether the map (h, w) is as sure inside a contour as it is in written lines of this height in pixels."""
        if line_height > MAX_HEIGHT * len(probability):
            return False
        wanted = np.interp(line_height, RISING_SCORE, (self.box_threshold, LARGE_SCORE))
        return bool(_score(probability, contour) >= wanted)


def _rapidocr_model() -> Path:
    """The detector's weights inside rapidocr's wheel; its code isn't imported, which would start three sessions."""
    spec = importlib.util.find_spec("rapidocr")
    if spec is None or spec.origin is None:
        raise UserError("text detection needs the package rapidocr (its weights): pip install it")
    return Path(spec.origin).parent / "models" / "PP-OCRv6_det_small.onnx"


def _multiple(value: float) -> int:
    return max(1, round(value / MULTIPLE)) * MULTIPLE


def _is_line(rectangle: tuple) -> bool:
    """Whether a rectangle (centre, size, angle) is shaped like a line of text."""
    _, (width, height), angle = rectangle
    short, long = sorted((width, height))
    slope = (angle + (90 if height > width else 0)) % 180  # of the longer side
    tilted = min(slope, 180 - slope) > MAX_TILT
    return bool(short >= MIN_SIDE and long >= (TILTED_ELONGATION if tilted else ELONGATION) * short)


def _score(probability: np.ndarray, contour: np.ndarray) -> float:
    """Mean probability inside a contour."""
    x, y, width, height = cv2.boundingRect(contour)
    inside = np.zeros((height, width), np.uint8)
    cv2.fillPoly(inside, [contour - np.array([x, y], contour.dtype)], 1)
    return float(cv2.mean(probability[y : y + height, x : x + width], inside)[0])


def _unclip(rectangle: tuple) -> tuple:
    """DB shrinks text while training: a rectangle (centre, size, angle) grown by area × ratio / perimeter a side."""
    centre, (width, height), angle = rectangle
    distance = width * height * UNCLIP_RATIO / (2 * (width + height))
    return centre, (width + 2 * distance, height + 2 * distance), angle
