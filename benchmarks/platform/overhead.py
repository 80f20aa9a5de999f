"""What the platform costs: `svd pipeline` beside the stages' functions called one after the other.

    python -m benchmarks.platform.overhead --preset tiny --repeats 1

The calls share one process and have neither Prefect, nor DVC, nor MLflow: what they take is work. `svd pipeline` starts
a temporary Prefect server, hashes and caches every output, and tracks every stage. Both start in a clean clone with the
same number of threads, in turns. Demanded at `tiny`: at most 1.05 times the wall time.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PLAIN = """
import sys
from flows.places import Place
from flows.stages import PIPELINE, STAGES
from svd.config.load import load_preset
from svd.stage import StageContext

preset = load_preset(sys.argv[1])
for name in PIPELINE:
    place = Place(preset.name, name)
    work = place.work("plain")
    work.mkdir(parents=True)
    inputs = {name: path for name, path in place.inputs.items() if path.is_dir()}
    STAGES[name].load()(StageContext(preset, inputs, place.output, work))
"""


def clone(folder: Path, preset: Path | None) -> Path:
    """Return a clean clone of this commit, with the preset file if it isn't one of the project's."""
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    if preset:
        shutil.copy(preset, folder / "presets")
    return folder


def measure(command: list[str], folder: Path) -> tuple[float, float]:
    """Run a command in a clone; return its wall time and its CPU time (with child processes) in seconds."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "SVD_"))}
    env |= {"PYTHONPATH": str(folder), "PATH": f"{BIN}{os.pathsep}{env['PATH']}", "PREFECT_HOME": str(folder / ".home")}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with (folder / "log").open("w") as log:
        subprocess.run(command, cwd=folder, env=env, stdout=log, stderr=log, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - begun, cpu


def main() -> None:
    """Measure both in turns and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="a preset's name, or a file")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each; the median counts")
    arguments = parser.parse_args()
    file = Path(arguments.preset) if arguments.preset.endswith(".yaml") else None
    name = file.stem if file else arguments.preset
    commands = {
        "plain calls": [sys.executable, "-c", PLAIN, name],
        "svd pipeline": [str(BIN / "svd"), "pipeline", "--preset", name],
    }
    taken: dict[str, list[tuple[float, float]]] = {what: [] for what in commands}
    for _ in range(arguments.repeats):
        for what, command in commands.items():
            with tempfile.TemporaryDirectory() as temporary:
                taken[what].append(measure(command, clone(Path(temporary) / "clone", file)))
    base = statistics.median(wall for wall, _ in taken["plain calls"])
    for what, runs in taken.items():
        wall, cpu = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"{what:14} {wall:8.1f} s wall   {cpu:8.1f} s CPU   {wall / base:6.3f} x plain calls")


if __name__ == "__main__":
    main()
