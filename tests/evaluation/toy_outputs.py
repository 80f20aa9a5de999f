"""Output folders of all stages as the report finds them, with toy contents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from evaluation.claims import paired_claim, share_claim, write_claims
from evaluation.frechet.distances import distance
from evaluation.frechet.moments import MomentState
from evaluation.frechet.protocol import named_protocols
from evaluation.frechet.results import Result, Score, paper_rows, result_json
from evaluation.tables import write_score_rows
from svd.core.files import write_json
from svd.media.video import write_mp4, write_png
from svd.synthetic.scenes import World, render_clip

TRAINED = (
    "image-pretraining",
    "video-pretraining",
    "high-quality-finetuning",
    "image-to-video",
    "multiview-finetuning",
)


def clip(index: int) -> np.ndarray:
    return render_clip(World(0, "test"), index, 8, 64, 96, 8).frames


def noisy(frames: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.clip(frames + rng.normal(0, 20, frames.shape), 0, 255).astype(np.uint8)


def write_curation(folder: Path) -> None:
    left, steps = 312, [{"step": "clips", "left": 312, "dropped": 0}]
    for name, dropped in (("motion", 78), ("similarity", 21), ("text_area", 17)):
        left -= dropped
        steps.append({"step": name, "left": left, "dropped": dropped, "dropped_alone": dropped + 9, "threshold": 0.2})
    write_json(folder / "funnel.json", {"steps": steps, "thresholds": {"motion": 0.2}})
    write_json(
        folder / "metrics.json",
        {
            "sources": 33,
            "clips": 312,
            "clips_kept": left,
            "truth_hard_cut_recall": 0.987,
            "truth_hard_cut_precision": 1.0,
        },
    )


def write_training(folder: Path, number: int) -> None:
    rng = np.random.default_rng(number)
    lines = ["step,train_loss,val_loss"]
    for step in range(0, 301, 5):
        value = 0.25 + 0.7 * np.exp(-step / 60)
        validated = f"{value + 0.03:.6f}" if step % 100 == 0 else ""
        lines.append(f"{step},{value + rng.normal(0, 0.03):.6f},{validated}")
    (folder / "losses.csv").write_text("\n".join(lines) + "\n")
    metrics: dict[str, float] = {"validation_loss_before": 0.98, "validation_loss_after": 0.285, "steps": 300}
    if folder.name in TRAINED:
        linear = {"validation_loss_linear": 0.31, "validation_margin_linear": 5.25, "validation_clips": 32}
        metrics |= linear | {"validation_loss_start": 0.29, "validation_margin_start": 1.25}
    write_json(folder / "metrics.json", metrics)
    for sample in range(2):
        real = clip(10 * number + sample)
        if "image-pre" in folder.name:
            write_png(folder / "samples" / f"generated-{sample}.png", noisy(real)[0])
            write_png(folder / "samples" / f"real-{sample}.png", real[0])
        else:
            write_mp4(folder / "samples" / f"generated-{sample}.mp4", noisy(real), 8)
            write_mp4(folder / "samples" / f"real-{sample}.mp4", real, 8)
    write_png(folder / "samples" / "sheet.png", real[0])


def write_evaluation(folder: Path) -> None:
    rng = np.random.default_rng(1)
    real = MomentState.of(rng.normal(size=(101, 48)))
    spreads = {"generated": 1.4, "noise": 4.0, "mean-frame": 2.5, "untrained": 3.0, "real-split": 1.0}
    scores = [
        Score(name, None if name in ("mean-frame", "real-split") else 0, distance(real, state))
        for name, spread in spreads.items()
        for state in [MomentState.of(rng.normal(0.1 * spread, spread, size=(101, 48)))]
    ]
    about = json.loads(json.dumps(named_protocols()["svd_ucf101_paper"].describe()))
    result = Result(
        "ucf101_fixture", "frechet_transnetv2", "TransNetV2 (sha256 abc)", about, {"unet": "0"}, tuple(scores),
        ("101 real clips for 1024 dimensions",),
    )  # fmt: skip
    write_json(folder / "result.json", result_json(result))
    write_score_rows(folder / "results.csv", [*result.rows(), *paper_rows()])
    write_json(folder / "metrics.json", {"ucf101_fixture_frechet_transnetv2": 1.0})
    listed = []
    for number in range(4):
        names = {kind: f"{kind}-{number}.mp4" for kind in ("generated", "real")}
        write_mp4(folder / "samples" / names["generated"], noisy(clip(number)), 8)
        write_mp4(folder / "samples" / names["real"], clip(number), 8)
        prompt = f"a <b>red</b> ring & disc {number}"
        listed.append({"class": f"Class{number}", "prompt": prompt, **names})
    (folder / "samples" / "samples.json").write_text(json.dumps(listed))


def write_views(folder: Path) -> None:
    lines = ["subject,psnr,ssim,clip_weights,objects,views,protocol,source"]
    lines += [f"{name},{psnr},0.5,toy-clip,8,8,p,measured" for name, psnr in (("generated", 16.2), ("mean view", 14.4))]
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    write_json(folder / "metrics.json", {"psnr": 16.2})
    write_png(folder / "samples" / "contact_sheet.png", np.concatenate([clip(3)[i] for i in range(8)], axis=1))
    write_mp4(folder / "samples" / "turntable.mp4", clip(3), 8)


def write_judgements(recognition: Path, animation: Path) -> None:
    right = [True] * 30 + [False] * 2
    claims = [
        share_claim("the prompt's colour is recognised", right, "the most frequent answer", 0.25, "abcdef0123456789")
    ]
    write_claims(recognition, claims)
    write_json(recognition / "metrics.json", {"prompts": 32, "colour_generated": 0.9375})
    first = paired_claim(
        "the first frame is the picture", [24.0, 25.0, 26.5], "the mean picture", [12.0, 13.5, 14.0], "dB"
    )
    write_claims(
        animation,
        [first, paired_claim("later frames follow", [17.0, 17.5], "the first frame repeated", [18, 18.2], "dB")],
    )
    write_json(animation / "metrics.json", {"psnr_first": 25.2})
    for folder in (recognition, animation):
        write_png(folder / "samples" / "sheet.png", np.concatenate([clip(0)[0], clip(1)[0]]))


def write_outputs(root: Path) -> dict[str, Path]:
    """All stages' folders below `root`."""
    judged = ("recognition-evaluation", "image-to-video-evaluation")
    evaluated = ("ucf101-evaluation", *judged, "multiview-benchmark")
    names = ("curation", "autoencoder", *TRAINED, *evaluated, "sources", "latents")
    folders = {name: root / name for name in names}
    for folder in folders.values():
        (folder / "samples").mkdir(parents=True)
    write_curation(folders["curation"])
    for number, name in enumerate(("autoencoder", *TRAINED)):
        write_training(folders[name], number)
    write_png(folders["autoencoder"] / "reconstructions.png", np.concatenate([clip(2)[0], noisy(clip(2))[0]], axis=1))
    write_evaluation(folders["ucf101-evaluation"])
    write_judgements(*(folders[name] for name in judged))
    write_views(folders["multiview-benchmark"])
    for name in ("sources", "latents"):
        write_json(folders[name] / "metrics.json", {"items": 3})
    return folders
