"""Two decoding processes against one, on eight equal sources.

    python -m benchmarks.curation.scaling [--seconds 20] [--sources 8] [--rounds 3]

Wall-clock time to analyse all sources and write their clips by copying, with one and with two of the processes that
curation runs (one decoding thread each), best of the rounds, taken by turns. The processes have started before the
clock does. Needs two cores that nothing else uses. The goal is 1.8.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from benchmarks.curation.speed import make
from svd.config.load import load_preset
from svd.curation.base.types import SourceFailure
from svd.curation.measuring.process import DecodeProcess

GOAL = 1.8


def curate(path: Path, target: Path, idle: SimpleQueue[DecodeProcess]) -> int:
    """Analyse one source and write its clips, as curation does; returns the number of clips."""
    decoding = idle.get()
    try:
        analysis = decoding.analyse(path, load_preset("paper").curation, lambda clip: clip)
        jobs = [(c.span, target / f"{i}.mp4") for i, c in enumerate(analysis.clips) if c.span.method == "copy"]
        return len(decoding.write_clips(path, analysis.facts, jobs))
    finally:
        idle.put(decoding)


def measure(sources: list[Path], processes: int) -> float:
    """Seconds that `processes` need for all sources."""
    with contextlib.ExitStack() as stack:
        idle: SimpleQueue[DecodeProcess] = SimpleQueue()
        for _ in range(processes):
            decoding = stack.enter_context(DecodeProcess())
            with contextlib.suppress(SourceFailure):
                decoding.analyse(Path("no such file"), load_preset("paper").curation)
            idle.put(decoding)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pool = stack.enter_context(ThreadPoolExecutor(processes))
        targets = [folder / str(number) for number in range(len(sources))]
        for target in targets:
            target.mkdir()
        started = time.monotonic()
        clips = list(pool.map(lambda pair: curate(*pair, idle), zip(sources, targets, strict=True)))
        seconds = time.monotonic() - started
    assert len(set(clips)) == 1, "equal sources have equally many clips"
    return seconds


def main() -> None:
    """Make the source, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=20, help="length of each source, 720p")
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder) / "source.mp4", 1280, 720, "libx264", options.seconds)
        best = {1: float("inf"), 2: float("inf")}
        for _ in range(options.rounds):
            for processes in best:
                best[processes] = min(best[processes], measure([path] * options.sources, processes))
    for processes, seconds in best.items():
        print(f"{processes} process{'es' if processes > 1 else ''}: {seconds:.2f} s for {options.sources} sources")
    ratio = best[1] / best[2]
    print(f"two are {ratio:.2f} x one (goal {GOAL}: {'reached' if ratio >= GOAL else 'NOT reached'})")


if __name__ == "__main__":
    main()
