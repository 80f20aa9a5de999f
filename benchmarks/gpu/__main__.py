"""Our networks against diffusers' on one accelerator, with random weights at full size, nothing to download:

    python -m benchmarks.gpu                            all sections
    python -m benchmarks.gpu --only sampling,decode     some of them
    python -m benchmarks.gpu --toy                      the same code at toy size, on a CPU

Needs torch and numpy, and diffusers for the comparison. Prints a row for each measurement and writes those so far to
--output after each section. An error of the device or of a compiler becomes the note of its row. Goals on an H200 in
bf16: SVD-XT with 25 frames at 576 x 1024, 25 steps and guidance in 8.0 s; decoding 25 frames in 0.45 s; 1.5 times as
fast as diffusers eager, 1.15 times as fast as diffusers compiled.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

from benchmarks.gpu import kernels, networks
from benchmarks.gpu.harness import Machine, Results, peer

# What has goals comes first. Attention, which asks kernels for more than some can do, comes last.
SECTIONS = {
    "decode": networks.decode,
    "sampling": networks.sampling,
    "profile": networks.profiles,
    "forward": networks.forward,
    "memory": networks.memory,
    "train": networks.train,
    "conv": kernels.convolution,
    "norm": kernels.normalisation,
    "attention": kernels.attention,
}


def parse() -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy sizes: shows on a CPU that everything runs")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each measurement; the median counts")
    parser.add_argument("--without", action="append", default=[], choices=networks.VARIANTS, help="leave a variant out")
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    options = parser.parse_args()
    options.only = options.only.split(",")
    unknown = set(options.only) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if options.device == "cpu" and not options.toy:
        parser.error("no CUDA device; full-size models need one (--toy runs on a CPU)")
    return options


def facts(machine: Machine) -> dict[str, str]:
    """What the figures belong to."""
    name = torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else platform.processor()
    diffusers = peer()
    return {
        "device": name or "cpu",
        "dtype": str(machine.dtype),
        "toy": str(machine.toy),
        "torch": torch.__version__,
        "diffusers": getattr(diffusers, "__version__", "not installed"),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
    }


def main() -> None:
    """Entry point."""
    options = parse()
    repeats = 1 if options.toy else options.repeats
    machine = Machine(torch.device(options.device), torch.bfloat16, options.toy, repeats, options.without)
    results = Results(machine)
    about = facts(machine)
    print("\n".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    for name in options.only:
        SECTIONS[name](results)
        if options.output:
            options.output.write_text(json.dumps({"about": about, "rows": results.as_json()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
