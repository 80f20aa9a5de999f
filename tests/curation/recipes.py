"""Recipes of CONTRIBUTING.md as edits of a copy of the code, made by inserting text."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class CodeCopy:
    """A copy of the product; `touched` are the files that an edit has changed or added, below `folder`."""

    folder: Path
    touched: set[str] = field(default_factory=set)

    @classmethod
    def make(cls, folder: Path) -> CodeCopy:
        """Copy the packages and the presets."""
        for name in ("svd", "evaluation", "flows", "presets"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        return cls(folder)

    def insert_before(self, path: str, anchor: str, text: str) -> None:
        """Insert `text` before the only occurrence of `anchor`."""
        content = (self.folder / path).read_text()
        assert content.count(anchor) == 1, f"{path}: the recipe names {anchor!r}, which must occur once"
        (self.folder / path).write_text(content.replace(anchor, text + anchor))
        self.touched.add(path)

    def add(self, path: str, text: str) -> None:
        """Add a file."""
        assert not (self.folder / path).exists()
        (self.folder / path).write_text(text)
        self.touched.add(path)


BRIGHTNESS_ROW = """    Axis(
        name="brightness",
        column="brightness",
        option="min_brightness",
        side="min",
        computed="measured",
        title="brightness",
        label="brightness",
        unit="mean of the middle frame, 0 to 1",
    ),
"""


def add_axis(code: CodeCopy) -> None:
    """Add the axis "brightness": the mean of the middle frame."""
    code.insert_before("svd/catalogue/axes.py", ")\nOPTIONS = ", BRIGHTNESS_ROW)
    code.insert_before(
        "svd/config/data.py", "\n\nclass CurationConfig", "    min_brightness: Threshold | None = None\n"
    )
    measure = '    "brightness": lambda clip: float(clip.frames[1].mean() / 255),\n'
    code.insert_before("svd/curation/measuring/axis_scores.py", "}\n\n\ndef axis_scores", measure)


COLOUR_CAPTIONER = '''"""The captioner `colour`: names the strongest channel of the middle frame."""

from __future__ import annotations

from collections.abc import Sequence

from svd.config import CaptionsConfig
from svd.curation.captions.base import CaptionRequest


class ColourCaptioner:
    """Names the strongest channel of the middle frame."""

    name = "colour"

    def describe(self, requests: Sequence[CaptionRequest]) -> list[str | None]:
        """Return one caption per clip."""
        names = ("red", "green", "blue")
        return [f"mostly {names[int(request.frames[1].mean((0, 1)).argmax())]}" for request in requests]


def make_colour(config: CaptionsConfig, device: str) -> ColourCaptioner:
    """Make the captioner."""
    return ColourCaptioner()
'''


def add_captioner(code: CodeCopy) -> None:
    """Add the captioner "colour"."""
    code.add("svd/curation/captions/colour.py", COLOUR_CAPTIONER)
    code.insert_before("svd/config/data.py", '"llm", "sidecar", "motion"]', '"colour", ')
