"""Text detectors by name."""

from __future__ import annotations

from pathlib import Path

from svd.config import TextConfig
from svd.core.errors import UserError
from svd.curation.text.base import TextDetector
from svd.curation.text.dbnet import DBTextDetector


def make_detector(config: TextConfig) -> TextDetector:
    """Make the configured detector; raises UserError when CRAFT is configured without its weights."""
    if config.detector == "craft":
        from svd.curation.text.craft import CraftTextDetector  # here: it imports torch, which the default does without

        if config.craft_weights is None:
            raise UserError(
                "curation.text.detector is 'craft' but curation.text.craft_weights is not set: give the path of "
                "craft_mlt_25k.pth (published by clovaai/CRAFT-pytorch), or use detector: rapidocr"
            )
        return CraftTextDetector(Path(config.craft_weights), config.craft_long_side)
    return DBTextDetector(config.width, config.height, config.box_threshold)
