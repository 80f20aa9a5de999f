"""What the one decode pass costs beside decoding alone, and beside one decode per stage as other tools do it.

    python -m benchmarks.curation.speed [--seconds 60] [--rounds 3] [--files a.mp4 …]

CPU seconds of one process (user + system, one decoding thread), smallest of the rounds, everything in one run;
ratios are what counts. Footage: the sample trailer looped and scaled by x264 to 720p30 and 1080p30 (and mpeg2 at
720p), so that decoding costs what it does for camera footage of its bit rate. Peer stages, each with its own
decode: three cut passes and an adaptive one (PySceneDetect on OpenCV), optical flow at 2 fps, frames for text
detection, frames for CLIP (OpenCV), as in video2dataset, NeMo Curator and Open-Sora's tools.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from scenedetect import AdaptiveDetector, ContentDetector, SceneManager, open_video

from svd.curation.analysis import analyse
from svd.curation.writing import write_clips
from svd.presets import load_preset

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
KINDS = {
    "h264 1280x720": (1280, 720, "libx264"),
    "h264 1920x1080": (1920, 1080, "libx264"),
    "mpeg2 1280x720": (1280, 720, "mpeg2video"),
}
FPS = 30


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


def ours(path: Path, folder: Path) -> None:
    """All stages without networks in one pass, and the clips written by copying packets."""
    config = load_preset("paper").curation
    analysis = analyse(path, config)
    jobs = [(c.span, folder / f"{i}.mp4") for i, c in enumerate(analysis.clips) if c.span.method == "copy"]
    write_clips(path, analysis.facts, jobs)


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


def measure(path: Path, label: str, rounds: int, peers: bool) -> None:
    """Print the table of one file; stages take turns, so that other load on the machine hits all alike."""
    stages: dict[str, Callable[[], None]] = {"decode": lambda: decode(path)}
    with tempfile.TemporaryDirectory() as folder:
        stages["one pass"] = lambda: ours(path, Path(folder))
        if peers:
            stages |= {name: (lambda f=f: f(path)) for name, f in PEER.items()}  # type: ignore[misc]
        best = {name: min(cpu(f) for _ in range(1)) for name, f in stages.items()}
        for _ in range(rounds - 1):
            best = {name: min(best[name], cpu(f)) for name, f in stages.items()}
    with av.open(str(path)) as container:
        seconds = float(container.duration or 1) / av.time_base
    print(f"\n{label}: {seconds:.0f} s, {path.stat().st_size * 8 / seconds / 1e6:.1f} Mb/s")
    for name, value in best.items():
        print(f"  {name:18} {value / seconds:.4f} CPU-s per s   {value / best['decode']:.2f} x decode")
    if peers:
        total = sum(best[name] for name in PEER)
        print(f"  one decode a stage {total / seconds:.4f} CPU-s per s   {total / best['one pass']:.1f} x the one pass")


def main() -> None:
    """Make the files, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
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
