"""Text detection: cost, recall on drawn subtitles, false alarms: `python -m benchmarks.text [--clips FILE ...]`.

Frames are taken twice a second from the sample footage (or other videos) and from synthetic scenes without a text
overlay; frames that show text themselves are named with --skip (file:first-last in seconds; the samples' titles by
default). Subtitles of several heights are drawn on every clean frame. Beside the project's settings stand rapidocr's
own defaults on the same frames. CPU time, one thread.
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

from svd.curation.text import DBTextDetector, area_ratio
from svd.data.synthetic import World, render_clip

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
# Seconds of the samples that show titles or shop signs.
TITLES = ("big-buck-bunny-trailer.mp4:0-5", "big-buck-bunny-trailer.mp4:11-18", "big-buck-bunny-trailer.mp4:21-99")
LINES = ("This is a subtitle line.", "What did you say to him?", "No, we leave at 7:30 tomorrow")
HEIGHTS = (24, 36)  # font size, in pixels of a 720p frame
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
FOUND = 0.003  # area ratio from which a frame counts as showing text: a third of a short line at 24 px
SYNTHETIC = 40


def video_frames(path: Path, skipped: list[tuple[float, float]]) -> list[np.ndarray]:
    """Two frames (H, W, 3) uint8 RGB a second, outside the skipped intervals."""
    frames, due = [], 0.0
    with av.open(str(path), "r") as container:
        stream = container.streams.video[0]
        start = float((stream.start_time or 0) * (stream.time_base or 0))
        for frame in container.decode(stream):
            seconds = float(frame.time or 0) - start
            if seconds >= due and not any(first <= seconds < last for first, last in skipped):
                frames.append(frame.to_ndarray(format="rgb24"))
                due = seconds + 0.5
    return frames


def subtitled(frame: np.ndarray, text: str, height: int) -> np.ndarray:
    """`text` in white with a black outline near the lower edge, in a font of `height` × H / 720 pixels."""
    font = ImageFont.truetype(FONT, max(9, round(height * frame.shape[0] / 720)))
    picture = Image.fromarray(frame)
    place = (frame.shape[1] / 2, frame.shape[0] * 0.94)
    outline = max(1, round(font.size / 16))
    ImageDraw.Draw(picture).text(place, text, "white", font, "ms", stroke_width=outline, stroke_fill="black")
    return np.asarray(picture)


def rapidocr_defaults() -> Callable[[np.ndarray], list[np.ndarray]]:
    """The detector as rapidocr runs it out of the box."""
    from rapidocr_onnxruntime import RapidOCR

    engine = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)
    return lambda frame: list(engine.text_det(np.ascontiguousarray(frame[..., ::-1]))[0])


def rates(detect: Callable[[np.ndarray], list[np.ndarray]], frames: list[np.ndarray]) -> tuple[float, float, float]:
    """Share of frames with text, share above the paper's 7 %, CPU milliseconds a frame."""
    began = time.process_time()
    areas = [area_ratio(detect(frame), *frame.shape[:2]) for frame in frames]
    milliseconds = 1000 * (time.process_time() - began) / max(1, len(frames))
    return float(np.mean([a > FOUND for a in areas])), float(np.mean([a > 0.07 for a in areas])), milliseconds


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
    detectors: dict[str, Callable[[np.ndarray], list[np.ndarray]]] = {"project": DBTextDetector().polygons}
    if arguments.peer:
        detectors["rapidocr defaults"] = rapidocr_defaults()
    table = Table("detector", "frames", "drawn text", "found", "above 7 %", "CPU ms a frame")
    for name, detect in detectors.items():
        for kind, frames in (("footage", real), ("synthetic", synthetic)):
            cases = {"none (false alarms)": frames}
            for height in HEIGHTS:
                cases[f"{height if kind == 'footage' else 3 * height} px"] = [
                    subtitled(frame, LINES[i % len(LINES)], height if kind == "footage" else 3 * height)
                    for i, frame in enumerate(frames)
                ]
            for case, shown in cases.items():
                found, large, cost = rates(detect, shown)
                table.add_row(name, f"{len(frames)} {kind}", case, f"{found:.3f}", f"{large:.3f}", f"{cost:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
