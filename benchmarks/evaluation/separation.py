"""Is a trained model closer to held-out clips than noise, the mean frame and an untrained network, on several seeds?

    python benchmarks/evaluation/separation.py outputs/tiny --seeds 3

Reads the stage folders of a finished run, samples again with each seed, prints one line a seed and subject, and exits
with 1 when any control is as close as the model on any seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evaluation.frechet import ucf101
from evaluation.frechet.results import load_result
from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.stage import StageContext

CONTROLS = ("noise", "mean-frame", "untrained")


def lines_of(scores: list[dict]) -> tuple[list[str], bool]:
    """One line a seed and subject, and whether the model won everywhere."""
    lines, won = [], True
    for own in (score for score in scores if score["subject"] == "generated"):
        rivals = [s for s in scores if s["subject"] in CONTROLS and s["seed"] in (own["seed"], None)]
        for score in [own, *rivals]:
            d = score["distance"]
            closer = d is own["distance"] or own["distance"]["frechet"]["value"] < d["frechet"]["value"]
            won &= closer
            note = "" if d is own["distance"] else ("  farther" if closer else "  AS CLOSE AS THE MODEL")
            lines.append(
                f"seed {own['seed']}  {score['subject']:<12} {d['frechet']['value']:9.3f} ± {d['standard_error']:.3f}"
                f"   kernel {d['kernel']['unbiased']:.5f} ± {d['kernel_standard_error']:.5f}{note}"
            )
    return lines, won


def main() -> int:
    """Evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder with the outputs of all stages")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("work/separation"), help="kept, so that it can be continued")
    options = parser.parse_args()
    changes = {"evaluation.ucf101.seeds": options.seeds, "evaluation.ucf101.controls": list(CONTROLS)}
    names = ("sources", "encoders", "autoencoder", "high-quality-finetuning")
    work = options.work / "work"
    work.mkdir(parents=True, exist_ok=True)
    context = StageContext(
        load_preset(options.preset, changes), {n: options.run / n for n in names}, options.work / "output", work
    )
    try:
        ucf101.run(context)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    result = load_result(context.output)
    lines, won = lines_of(result["scores"])
    print(f"{result['dataset']}, {result['metric']}, {result['weights']}, protocol {result['protocol']['digest']}")
    print("\n".join(lines))
    print("closer than every control on every seed" if won else "NOT closer than every control")
    return 0 if won else 1


if __name__ == "__main__":
    sys.exit(main())
