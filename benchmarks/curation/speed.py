"""What the one decode pass costs beside decoding alone, and beside one decode per stage as other tools do it.

    python -m benchmarks.curation.speed [--seconds 60] [--rounds 5] [--no-peers] [--files a.mp4 …]

CPU seconds of one process (user + system, one decoding thread). In each round all stages take turns, with a decode
before each, and a stage's ratio is that to the mean of the decodes before and after it; printed are medians of the
rounds, so that other load on the machine, which comes and goes, cancels. Footage: the sample trailer looped, grained
and scaled, coded by x264 at 720p30 and 1080p30 (and mpeg2 at 720p without B-frames: nothing can be left out).

One pass: all stages without networks as in the preset `paper`: three cut passes, motion, camera motion, sampled frames,
clips written by copying packets. Beside it the same with a fourth, adaptive cut pass, which needs every frame. Peer
stages, each with its own decode: three cut passes and an adaptive one (PySceneDetect on OpenCV), optical flow at 2 fps,
frames for text detection, frames for CLIP (OpenCV), as in video2dataset, NeMo Curator and Open-Sora's tools.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from scenedetect import AdaptiveDetector, ContentDetector, SceneManager, open_video

from svd.config import CurationConfig
from svd.config.load import load_preset
from svd.curation.clips.writer import write_clips
from svd.curation.measuring.decode_pass import analyse

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
KINDS = {
    "h264 1280x720": (1280, 720, "libx264"),
    "h264 1920x1080": (1920, 1080, "libx264"),
    "mpeg2 1280x720": (1280, 720, "mpeg2video"),
}
FPS = 30
ADAPTIVE = {"detector": "adaptive", "threshold": 3.0}


def make(path: Path, width: int, height: int, codec: str, seconds: int) -> Path:
    """Encode the looped trailer, with a little grain, at this size."""
    generator = np.random.default_rng(0)
    grain = [generator.normal(0, 3, (height, width)).astype(np.int16) for _ in range(8)]
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = 60
        stream.codec_context.time_base = Fraction(1, FPS)
        if codec == "libx264":
            stream.codec_context.options = {"preset": "veryfast", "crf": "23"}
        else:
            stream.codec_context.bit_rate = 8_000_000
        count = 0
        while count < seconds * FPS:
            with av.open(str(SAMPLES / "big-buck-bunny-trailer.mp4")) as source:
                for frame in source.decode(video=0):
                    planes = frame.reformat(width, height, "yuv420p").to_ndarray()
                    luma = planes[:height].astype(np.int16) + grain[count % 8]
                    planes[:height] = np.clip(luma, 0, 255)
                    picture = av.VideoFrame.from_ndarray(planes, format="yuv420p")
                    picture.pts, picture.time_base = count, Fraction(1, FPS)
                    output.mux(stream.encode(picture))
                    count += 1
                    if count >= seconds * FPS:
                        break
        output.mux(stream.encode(None))
    return path


def decode(path: Path) -> None:
    """Decoding alone: PyAV, one thread, every frame."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            packet.decode()


def ours(path: Path, config: CurationConfig) -> None:
    """All stages without networks in one pass, and the clips written by copying packets."""
    with tempfile.TemporaryDirectory() as folder:
        analysis = analyse(path, config)
        copies = [c.span for c in analysis.clips if c.span.method == "copy"]
        write_clips(path, analysis.facts, [(span, Path(folder) / f"{i}.mp4") for i, span in enumerate(copies)])


def cut_pass(path: Path, detector: ContentDetector | AdaptiveDetector, skip: int = 0) -> None:
    """A pass of PySceneDetect over its own decode."""
    manager = SceneManager()
    manager.add_detector(detector)
    manager.detect_scenes(open_video(str(path)), frame_skip=skip)


def flow_pass(path: Path) -> None:
    """Farnebäck at 2 fps and 64 px over its own decode."""
    capture, last = cv2.VideoCapture(str(path)), None
    for i in range(10**9):
        ok, frame = capture.read()
        if not ok:
            return
        if i % (FPS // 2) == 0:
            grey = cv2.cvtColor(cv2.resize(frame, (114, 64), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2GRAY)
            if last is not None:
                cv2.calcOpticalFlowFarneback(last, grey, None, 0.5, 3, 15, 3, 5, 1.2, 0)  # type: ignore[call-overload]
            last = grey


def frames_pass(path: Path, size: tuple[int, int]) -> None:
    """One frame a second for a network, over its own decode."""
    capture, kept = cv2.VideoCapture(str(path)), []
    for i in range(10**9):
        ok, frame = capture.read()
        if not ok:
            return
        if i % FPS == 0:
            kept = [*kept[-2:], cv2.resize(frame, size, interpolation=cv2.INTER_AREA)]


PEER: dict[str, Callable[[Path], None]] = {
    "cuts, every frame": lambda p: cut_pass(p, ContentDetector(threshold=27)),
    "cuts, 8 fps": lambda p: cut_pass(p, ContentDetector(threshold=24), 3),
    "cuts, 2 fps": lambda p: cut_pass(p, ContentDetector(threshold=20), 14),
    "cuts, adaptive": lambda p: cut_pass(p, AdaptiveDetector()),
    "optical flow": flow_pass,
    "frames for text": lambda p: frames_pass(p, (640, 352)),
    "frames for CLIP": lambda p: frames_pass(p, (224, 224)),
}


def cpu(function: Callable[[], None]) -> float:
    """CPU seconds of a call."""
    started = time.process_time()
    function()
    return time.process_time() - started


def rounds_of(stages: dict[str, Callable[[], None]], base: Callable[[], None], count: int) -> dict[str, np.ndarray]:
    """CPU seconds of each stage and, in the second column, of the base around it: (count, 2)."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in stages}
    for _ in range(count):
        before = cpu(base)
        for name, stage in stages.items():
            spent, after = cpu(stage), cpu(base)
            times[name].append((spent, (before + after) / 2))
            before = after
    return {name: np.array(t) for name, t in times.items()}


def measure(path: Path, label: str, rounds: int, peers: bool) -> None:
    """Print the table of one file."""
    config = load_preset("paper").curation
    adaptive = load_preset("paper", {"curation.cuts.passes": [*map(vars, config.cuts.passes), ADAPTIVE]}).curation
    stages: dict[str, Callable[[], None]] = {
        "one pass": lambda: ours(path, config),
        "… with adaptive": lambda: ours(path, adaptive),
    }
    times = rounds_of(stages, lambda: decode(path), rounds)
    if peers:
        times |= rounds_of({n: functools.partial(f, path) for n, f in PEER.items()}, lambda: decode(path), 1)
    with av.open(str(path)) as container:
        seconds = float(container.duration or 1) / av.time_base
    base = float(np.median(np.concatenate([t[:, 1] for t in times.values()])))
    print(f"\n{label}: {seconds:.0f} s, {path.stat().st_size * 8 / seconds / 1e6:.1f} Mb/s")
    print(f"  {'decoding alone':18} {base / seconds:.4f} CPU-s per s")
    ratio = {name: t[:, 0] / t[:, 1] for name, t in times.items()}
    for name, values in ratio.items():
        spread = f"  ({values.min():.2f}–{values.max():.2f})" if len(values) > 1 else ""
        print(
            f"  {name:18} {np.median(times[name][:, 0]) / seconds:.4f} CPU-s per s   {np.median(values):.2f} x{spread}"
        )
    if peers:
        total = sum(float(ratio[name][0]) for name in PEER)
        print(
            f"  one decode a stage {total:.2f} x decoding, {total / float(np.median(ratio['one pass'])):.1f} x one pass"
        )


def main() -> None:
    """Make the files, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=Path, nargs="*", help="measure these instead")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = {str(p): p for p in options.files or []}
        for label, (width, height, codec) in ({} if files else KINDS).items():
            suffix = "mp4" if codec == "libx264" else "mpg"
            files[label] = make(Path(folder) / f"{width}{codec}.{suffix}", width, height, codec, options.seconds)
        for label, path in files.items():
            measure(path, label, options.rounds, not options.no_peers)


if __name__ == "__main__":
    main()
