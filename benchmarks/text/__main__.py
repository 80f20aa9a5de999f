"""Text detection: cost, recall on drawn subtitles, false alarms: `python -m benchmarks.text [--clips FILE ...]`.

Frames are taken four times a second from the sample footage (or other videos) and from synthetic scenes without a text
overlay; frames that show text themselves are named with --skip (file:first-last in seconds; the samples' titles by
default). They are scaled as the decode pass scales them. All of them count for the false alarms; on every second one
lines of text of several sizes are drawn near the lower edge, in four fonts and four styles in turn; plain light or dark
letters only where the mean grey of the background lets a viewer read them (else outlined; over lit windows some
letters are then still hard to read). Beside the project's settings stand rapidocr's own defaults on the same frames
(--peer). CPU time of detection alone, one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from svd.curation.decoding.decoder import FRAME_WIDTH
from svd.curation.text.base import area_ratio
from svd.curation.text.dbnet import DBTextDetector
from svd.synthetic.scenes import World, render_clip

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
# Seconds of the samples that show titles.
TITLES = ("big-buck-bunny-trailer.mp4:0-3.1", "big-buck-bunny-trailer.mp4:12-16")
LINES = ("This is a subtitle line.", "What did you say to him?", "No, we leave at 7:30 tomorrow")
HEIGHTS = (18, 24, 30, 36, 48)  # font size, in pixels of a 720p frame
FONTS = [
    Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVu{name}.ttf"
    for name in ("Sans", "Sans-Bold", "Serif", "SansMono")
]
# Letters, outline, and the darkest and brightest background (grey level) they are drawn on.
STYLES = {
    "outlined": ("white", "black", 0, 255),
    "light": ((235, 235, 225), None, 0, 150),
    "dark": ((20, 20, 20), None, 100, 255),
    "yellow": ((250, 220, 40), "black", 0, 255),
}
FOUND = 0.003  # area ratio from which a frame counts as showing text: a third of a short line at 24 px
SYNTHETIC = 80
Detect = Callable[[np.ndarray], list[np.ndarray]]


def video_frames(path: Path, skipped: list[tuple[float, float]]) -> list[np.ndarray]:
    """Four frames (H, W, 3) uint8 RGB a second, outside the skipped intervals."""
    frames, due = [], 0.0
    with av.open(str(path), "r") as container:
        stream = container.streams.video[0]
        start = float((stream.start_time or 0) * (stream.time_base or 0))
        for frame in container.decode(stream):
            seconds = float(frame.time or 0) - start
            if seconds >= due and not any(first <= seconds < last for first, last in skipped):
                frames.append(frame.to_ndarray(format="rgb24"))
                due = seconds + 0.25
    return frames


def as_kept(frame: np.ndarray) -> np.ndarray:
    """The frame (H, W, 3) at the size at which the decode pass keeps it."""
    height, width = frame.shape[:2]
    if width <= FRAME_WIDTH:
        return frame
    return cv2.resize(frame, (FRAME_WIDTH, round(height * FRAME_WIDTH / width)), interpolation=cv2.INTER_AREA)


def readable(frame: np.ndarray, style: str) -> bool:
    """Whether letters of a style can be read on the frame's lower part."""
    height, width = frame.shape[:2]
    background = float(frame[int(0.88 * height) : int(0.95 * height), width // 5 : -width // 5].mean())
    return STYLES[style][2] <= background <= STYLES[style][3]


def subtitled(frame: np.ndarray, number: int, height: int) -> tuple[np.ndarray, str]:
    """A line of text near the lower edge of the frame, of `height` × H / 720 pixels, and its style; line, style and
    font follow from the number.
    """
    style = list(STYLES)[number % len(STYLES)]
    style = style if readable(frame, style) else "outlined"
    letters, outline, _, _ = STYLES[style]
    font = ImageFont.truetype(FONTS[number // len(STYLES) % len(FONTS)], max(9, round(height * frame.shape[0] / 720)))
    picture = Image.fromarray(frame)
    place = (frame.shape[1] / 2, frame.shape[0] * 0.94)
    stroke = max(1, round(font.size / 16)) if outline else 0
    text = LINES[number % len(LINES)]
    ImageDraw.Draw(picture).text(place, text, letters, font, "ms", stroke_width=stroke, stroke_fill=outline)
    return np.asarray(picture), style


def rapidocr_defaults() -> Detect:
    """The detector as rapidocr runs it out of the box."""
    from rapidocr import RapidOCR

    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    engine = RapidOCR(params=threads)

    def detect(frame: np.ndarray) -> list[np.ndarray]:
        boxes = engine(np.ascontiguousarray(frame[..., ::-1]), use_cls=False, use_rec=False).boxes
        return [] if boxes is None else list(boxes)

    return detect


def measure(detect: Detect, frames: list[np.ndarray], scale: int) -> list[tuple[str, int, float, float, float]]:
    """Rows of case, number of frames, share of them where text is found, share above the paper's 7 %, CPU ms a frame.

    Cases are clean frames, sizes (of letters `scale` times as large), styles, and all sizes from 24 px together.
    """
    areas: dict[str, list[float]] = {}
    spent: dict[str, float] = {}

    def look(frame: np.ndarray, *cases: str) -> None:
        kept = as_kept(frame)
        began = time.process_time()
        area = area_ratio(detect(kept), *kept.shape[:2])
        for case in cases:
            spent[case] = spent.get(case, 0.0) + time.process_time() - began
            areas.setdefault(case, []).append(area)

    for frame in frames:
        look(frame, "none: false alarms")
    least = f"from {scale * 24} px"
    for i, frame in enumerate(frames[::2]):
        for j, height in enumerate(HEIGHTS):
            shown, style = subtitled(frame, 7 * i + j, scale * height)
            look(shown, f"{scale * height} px", *([f"{style}, {least}", f"all, {least}"] if height >= 24 else []))
    order = ["none: false alarms", *(f"{scale * h} px" for h in HEIGHTS), *(f"{s}, {least}" for s in STYLES)]
    rows = []
    for case in [*order, *(c for c in areas if c not in order)]:
        found = np.array(areas[case])
        rows.append(
            (case, len(found), *(float((found > a).mean()) for a in (FOUND, 0.07)), 1000 * spent[case] / len(found))
        )
    return rows


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, nargs="*", default=sorted(SAMPLES.glob("*.mp*")))
    parser.add_argument("--skip", nargs="*", default=TITLES, help="file:first-last, in seconds, that show text")
    parser.add_argument("--peer", action="store_true", help="also time rapidocr's own defaults (slow)")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    skipped: dict[str, list[tuple[float, float]]] = {}
    for item in arguments.skip:
        name, _, span = item.rpartition(":")
        first, last = span.split("-")
        skipped.setdefault(name, []).append((float(first), float(last)))
    real = [frame for path in arguments.clips for frame in video_frames(path, skipped.get(path.name, []))]
    world = World(0, "train")
    synthetic = [render_clip(world, index, 1, 128, 192, 24).frames[0] for index in range(SYNTHETIC)]
    detectors: dict[str, Detect] = {"project": DBTextDetector().polygons}
    if arguments.peer:
        detectors["rapidocr defaults"] = rapidocr_defaults()
    table = Table("detector", "frames", "drawn text", "number", "found", "above 7 %", "CPU ms")
    for name, detect in detectors.items():
        # Synthetic frames are 128 px high: their letters are three times as large for their size.
        for kind, frames, scale in (("footage", real, 1), ("synthetic", synthetic, 3)):
            for case, number, found, large, cost in measure(detect, frames, scale):
                table.add_row(name, kind, case, str(number), f"{found:.3f}", f"{large:.3f}", f"{cost:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
