"""Peak memory of each process while a long 1080p video is curated.

    python -m benchmarks.curation.memory [--minutes 15 60] [--seconds 20]

The stage runs as it does in a pipeline, with the tiny preset and one worker: the run itself (tables, statistics), the
process that decodes (text detection included) and the one that holds the networks. Resident memory of each is sampled
ten times a second, and the private part of it, without the pages of libraries. The video is a clip of the sample
trailer, scaled to 1080p30 by x264 and repeated by copying packets, so every repetition has the trailer's cuts. Prints a
line for each process and length: memory must not grow with it. What the networks' process needs is that of torch and
the networks, whatever is curated; the limit is that of the others.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import psutil

# What a run needs is imported where it is used: the processes that it spawns import this file again.

LIMIT_MB = 600


def repeat(source: Path, target: Path, seconds: float) -> Path:
    """Repeat a video by copying its packets until it is `seconds` long, with timestamps that go on rising."""
    import av

    with av.open(str(source)) as probe:
        length = int(probe.streams.video[0].duration or 0)
        base = probe.streams.video[0].time_base
        assert base is not None
    with av.open(str(target), "w") as output:
        track = None
        for number in range(max(1, round(seconds / float(length * base)))):
            with av.open(str(source)) as container:
                stream = container.streams.video[0]
                if track is None:
                    track = output.add_stream_from_template(stream)
                for packet in container.demux(stream):
                    if packet.pts is None or packet.dts is None:
                        continue
                    packet.pts, packet.dts = packet.pts + number * length, packet.dts + number * length
                    packet.stream = track
                    output.mux(packet)
    return target


def write_encoders(folder: Path) -> None:
    """An untrained toy CLIP: memory does not depend on what it has learnt."""
    from svd.config.load import load_preset
    from svd.model.formats import clip

    preset = load_preset("tiny")
    config = clip.toy_config(preset.encoders.toy_width, preset.model.unet.cross_attention_dim)
    clip.save_toy(clip.build_clip(config, "toy"), config, folder)


def curate(folder: Path) -> None:
    """Run the stage on `folder`/sources."""
    from svd.config.load import load_preset
    from svd.curation import stage
    from svd.stage import StageContext

    os.environ["SVD_NO_PROGRESS"] = "1"
    preset = load_preset("tiny", {"compute.curation.workers": 1, "curation.part_seconds": 1e9})
    inputs = {"sources": folder / "sources", "encoders": folder / "encoders"}
    print("  " + stage.run(StageContext(preset, inputs, folder / "output", folder / "work")).summary)


def what(process: psutil.Process, run: int) -> str:
    """Which of the three processes it is."""
    if process.pid == run:
        return "run"
    return "networks" if "libtorch" in Path(f"/proc/{process.pid}/maps").read_text() else "decoding"


def private(process: psutil.Process) -> float:
    """Resident memory in MB that belongs to no file."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3


def watch(process: psutil.Process) -> dict[str, tuple[float, float]]:
    """Peaks of resident and of private memory in MB of a process and of its children, until it ends."""
    peaks: dict[str, tuple[float, float]] = {}
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        for one in [process, *process.children(recursive=True)]:
            try:
                name = what(one, process.pid)
                resident, own = peaks.get(name, (0.0, 0.0))
                peaks[name] = max(resident, one.memory_info().rss / 1e6), max(own, private(one))
            except (psutil.Error, OSError):
                continue
        time.sleep(0.1)
    return peaks


def measure(short: Path, folder: Path, minutes: float) -> None:
    """Curate the clip repeated to this length; print the peaks."""
    (folder / "sources" / "footage").mkdir(parents=True)
    write_encoders(folder / "encoders")
    video = repeat(short, folder / "sources" / "footage" / "long.mp4", 60 * minutes)
    process = multiprocessing.get_context("spawn").Process(target=curate, args=(folder,))
    started = time.monotonic()
    process.start()
    assert process.pid is not None
    peaks = watch(psutil.Process(process.pid))
    process.join()
    size = video.stat().st_size / 1e6
    assert process.exitcode == 0
    print(f"{minutes:g} min, {size:.0f} MB, {time.monotonic() - started:.0f} s")
    for name, (resident, own) in peaks.items():
        verdict = "" if name == "networks" or resident < LIMIT_MB else f"  NOT under {LIMIT_MB} MB"
        print(f"  {name:8} resident {resident:5.0f} MB, private {own:5.0f} MB{verdict}", flush=True)


def main() -> None:
    """Make the clip, measure every length."""
    from benchmarks.curation.speed import make

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[15, 60])
    parser.add_argument("--seconds", type=int, default=20, help="length of the clip that is repeated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        short = make(Path(folder) / "short.mp4", 1920, 1080, "libx264", options.seconds)
        for minutes in options.minutes:
            with tempfile.TemporaryDirectory(dir=folder) as one:
                measure(short, Path(one), minutes)


if __name__ == "__main__":
    main()
