"""Accuracy of cut detection on rendered worlds whose cuts are known, with PySceneDetect's defaults beside it.

    python -m benchmarks.curation.accuracy [--videos 24] [--height 128] [--width 192] [--seed 7]

A hard cut counts as found when one of ours is within two frames of it; a fade or dissolve when intervals overlap.
PySceneDetect reports single frames: a gradual transition counts as found when one lies in it or within two frames.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scenedetect import AdaptiveDetector, ContentDetector, SceneManager, open_video

from svd.config import SyntheticWorlds
from svd.config.load import load_preset
from svd.curation.measuring.decode_pass import analyse
from svd.synthetic.videos import write_worlds

TOLERANCE = 2


@dataclass
class Tally:
    """Counts over videos. overlap: sum of intersection over union of found gradual transitions."""

    hard: int = 0
    hard_found: int = 0
    gradual: int = 0
    gradual_found: int = 0
    reported: int = 0
    reported_right: int = 0
    overlap: float = 0.0
    reported_hard: int = 0
    reported_hard_right: int = 0

    def figures(self) -> dict[str, float]:
        """Recall of hard and of gradual transitions, precision over all reports, F1 of hard cuts, mean overlap."""
        recall = self.hard_found / max(1, self.hard)
        precision = self.reported_hard_right / max(1, self.reported_hard)
        return {
            "hard_recall": recall,
            "hard_precision": precision,
            "hard_f1": 2 * recall * precision / max(1e-9, recall + precision),
            "gradual_recall": self.gradual_found / max(1, self.gradual),
            "gradual_overlap": self.overlap / max(1, self.gradual_found),
            "precision": self.reported_right / max(1, self.reported),
        }


def judge(tally: Tally, truth: list[dict[str, Any]], found: list[tuple[int, int, bool]], where: str = "") -> None:
    """Add one video: truth is its list of transitions, found the (start, end, gradual) that a detector reports."""
    used: set[int] = set()
    for t in truth:
        start, end = t["start_frame"], t["end_frame"]
        near = [
            i for i, (s, e, _) in enumerate(found) if i not in used and s <= end + TOLERANCE and start <= e + TOLERANCE
        ]
        hard = t["kind"] == "hard"
        if hard:
            near = [
                i for i in near if abs(found[i][1] - end) <= TOLERANCE and found[i][1] - found[i][0] <= 2 * TOLERANCE
            ]
            tally.hard += 1
            tally.hard_found += bool(near)
        else:
            tally.gradual += 1
            tally.gradual_found += bool(near)
        if near:
            best = min(near, key=lambda i: abs(found[i][1] - end))
            used.add(best)
            s, e, _ = found[best]
            if not hard and e > s:
                tally.overlap += max(0, min(e, end) - max(s, start)) / (max(e, end) - min(s, start))
        elif where:
            print(f"{where}: missed {t['kind']} {start}-{end}; found {[f for f in found if abs(f[0] - start) < 60]}")
    for i, f in enumerate(found):
        gradual_hit = i in used and not any(
            t["kind"] == "hard" and abs(t["end_frame"] - f[1]) <= TOLERANCE for t in truth
        )
        tally.reported += 1
        tally.reported_right += i in used
        if not f[2] and not gradual_hit:
            tally.reported_hard += 1
            tally.reported_hard_right += i in used
        if where and i not in used:
            print(f"{where}: false {f}")


def library_cuts(path: Path, detector: AdaptiveDetector | ContentDetector) -> list[tuple[int, int, bool]]:
    """What PySceneDetect with its defaults reports."""
    manager = SceneManager()
    manager.add_detector(detector)
    manager.detect_scenes(open_video(str(path)))
    return [(s[0].frame_num, s[0].frame_num, False) for s in manager.get_scene_list()[1:]]


def main() -> None:
    """Render, analyse, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="keep the rendered worlds here")
    parser.add_argument("--verbose", action="store_true", help="list what is missed and what is false")
    options = parser.parse_args()
    config = load_preset("tiny").curation
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "train").exists():
            worlds = SyntheticWorlds(
                train_videos=options.videos, test_videos=1, height=options.height, width=options.width
            )
            write_worlds(folder, worlds, options.seed)
        truth = json.loads((folder / "truth.json").read_text())
        ours, content, adaptive = Tally(), Tally(), Tally()
        for name, video in sorted(truth.items()):
            path = folder / name
            found = [(c.start_frame, c.end_frame, c.kind != "hard") for c in analyse(path, config).cuts]
            judge(ours, video["cuts"], found, name if options.verbose else "")
            judge(content, video["cuts"], library_cuts(path, ContentDetector()))
            judge(adaptive, video["cuts"], library_cuts(path, AdaptiveDetector()))
    for label, tally in (("cascade", ours), ("ContentDetector", content), ("AdaptiveDetector", adaptive)):
        figures = " ".join(f"{k} {v:.3f}" for k, v in tally.figures().items())
        print(f"{label:17} {figures}  (hard {tally.hard}, gradual {tally.gradual}, reported {tally.reported})")


if __name__ == "__main__":
    main()
