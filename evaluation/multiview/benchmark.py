"""Stage `multiview-benchmark`: novel views of unseen objects against rendered truth (§4.5, Fig. 10).

The model gets one view of each held-out object and generates the whole orbit; each view is compared with the true one.
The same run scores controls: a copy of the input view and the mean view of all objects, which need no model; the
untrained network; and the truth passed through the autoencoder, an upper bound for most models. A sampled orbit pays
for being one of many possible ones, so the one-step estimate, which is near their mean, is scored as well.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evaluation.claims import Claim, paired_claim, write_claims
from evaluation.multiview.alignment import Alignment, best_alignment
from evaluation.multiview.figures import azimuth_chart, turntable, views_sheet
from evaluation.multiview.image_metrics import Perceptor
from evaluation.multiview.protocol import Truth, ViewProtocol, Views, render_truth, save_array, view_protocol
from evaluation.multiview.scores import Measures, Scores, published_rows, rows, score
from evaluation.tables import markdown, write_csv
from evaluation.untrained import untrained
from svd.config import Sampling
from svd.core.device import pick_device
from svd.core.files import write_json
from svd.generation import Models, load_models, multiview
from svd.media.video import write_gif, write_mp4, write_png
from svd.model.autoencoder import posterior_mean
from svd.model.formats.folders import checkpoint_hash
from svd.orbits.renderer import open_renderer
from svd.stage import Report, StageContext, publish

ONE_STEP = "one-step estimate"
MODEL_FREE = ("copy of the input view", "mean view")
SUBJECTS = ("generated", ONE_STEP, *MODEL_FREE, "untrained", "autoencoder")
_SHOWN = 4
_PIXELS_AT_ONCE = 300_000
_TURNS = 2


def run(context: StageContext) -> Report:
    """Evaluate the multi-view model; a killed run resumes object by object.

    Inputs: multiview-finetuning, autoencoder, encoders. Raises UserError for missing models, meshes and weights, and
    when no renderer works.
    """
    config, seed = context.preset.evaluation.multiview, context.preset.seed
    device = pick_device()
    with open_renderer(config.renderer) as renderer:
        protocol = view_protocol(config, renderer.name)
        truth = render_truth(context.work / "truth" / protocol.digest, config, protocol, seed, renderer)
    unet, autoencoder = context.inputs["multiview-finetuning"] / "unet", context.inputs["autoencoder"]
    perceptor = Perceptor(config.perceptual, config.lpips_weights, device)
    models = load_models(unet, autoencoder, context.inputs["encoders"], context.preset.encoders, device)
    measures = Measures(perceptor, models.encoders, device)
    makers = _subjects(context, models, truth, protocol, seed)
    scores = [score(name, makers[name], truth, measures) for name in tqdm(SUBJECTS, "scoring", unit="subject")]
    alignment = best_alignment(scores[0].pairs)
    hashes = {"unet": checkpoint_hash(unet), "autoencoder": checkpoint_hash(autoencoder)}
    finished = context.work / "finished"
    _write(finished, scores, truth, makers["generated"], protocol, measures, alignment, hashes)
    metrics = _metrics(scores, alignment, truth, protocol, measures)
    context.tracker.log_metrics({k: v for k, v in metrics.items() if isinstance(v, int | float)}, 0)
    context.tracker.log_file(finished / "samples" / "contact_sheet.png", "multiview")
    context.tracker.log_file(finished / "samples" / "turntable.mp4", "multiview")
    return publish(finished, context.output, Report(metrics, _summary(scores, alignment, perceptor)))


def _subjects(
    context: StageContext, models: Models, truth: Truth, protocol: ViewProtocol, seed: int
) -> dict[str, Callable[[int], Views]]:
    """Return for each subject the function that gives its views of object i.

    The views of models are generated here and kept in `context.work`.
    """
    sampling = context.preset.evaluation.multiview.sampling
    # The denoised orbit at the highest noise level: close to the mean of all orbits that the input view allows.
    once = sampling.model_copy(update={"steps": 1, "guidance": 1.0})
    folder = context.work / "views" / protocol.digest
    made = {
        "generated": generate(folder / "generated", models, truth, protocol, sampling, seed),
        ONE_STEP: generate(folder / ONE_STEP, models, truth, protocol, once, seed, at_once=1),
        "untrained": generate(folder / "untrained", untrained(models, seed), truth, protocol, sampling, seed),
    }
    average = mean_view(truth)
    return {
        **{name: partial(_loaded, files) for name, files in made.items()},
        "copy of the input view": lambda i: truth.views(i)[[-1] * protocol.views],
        "mean view": lambda i: np.stack([average] * protocol.views),
        "autoencoder": lambda i: reconstruct(models, truth.views(i)),
    }


def _loaded(files: Sequence[Path], number: int) -> Views:
    return np.asarray(np.load(files[number]), np.uint8)


def object_seed(seed: int, number: int) -> int:
    """Return the seed of the orbit of object `number`; it doesn't depend on batches or order."""
    return int.from_bytes(hashlib.sha256(f"multiview:{seed}:{number}".encode()).digest()[:7], "big")


def generate(
    folder: Path,
    models: Models,
    truth: Truth,
    protocol: ViewProtocol,
    sampling: Sampling,
    seed: int,
    at_once: int | None = None,
) -> list[Path]:
    """Generate an orbit from the last true view of each object, one array file each; finished ones are kept.

    at_once: objects in a batch; None: as many as keep memory small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / file.name for file in truth.files]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    batch = at_once or max(1, _PIXELS_AT_ONCE // (protocol.views * protocol.size**2))
    for first in tqdm(range(0, len(missing), batch), f"orbits: {folder.name}", unit="batch"):
        numbers = missing[first : first + batch]
        given = torch.stack([torch.from_numpy(truth.views(number)[-1].copy()) for number in numbers])
        orbits = multiview(
            models,
            given.permute(0, 3, 1, 2).float() / 255,
            protocol.elevation,
            protocol.views,
            sampling=sampling,
            seed=[object_seed(seed, number) for number in numbers],
            progress=False,
        )
        images = (orbits * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 1, 3, 4, 2).cpu().numpy()
        for number, orbit in zip(numbers, images, strict=True):
            save_array(files[number], orbit)
    return files


def mean_view(truth: Truth) -> Views:
    """Return the mean of all true novel views of all objects, (S, S, 3): the best guess without looking."""
    means = [truth.views(number)[:-1].mean(0) for number in range(len(truth.names))]
    return np.asarray(np.round(np.mean(means, axis=0)), np.uint8)


@torch.no_grad()
def reconstruct(models: Models, images: Views) -> Views:
    """Pass views (V, S, S, 3) through encoder and decoder."""
    frames = torch.from_numpy(images.copy()).permute(0, 3, 1, 2)[None].to(models.device).float() / 127.5 - 1
    autoencoder = models.autoencoder
    frames = frames.to(next(autoencoder.parameters()).dtype)
    decoded = autoencoder.decode(posterior_mean(autoencoder.encode(frames, models.decode_chunk)), models.decode_chunk)
    restored = ((decoded[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.asarray(restored.permute(0, 2, 3, 1).cpu().numpy(), np.uint8)


def _write(
    finished: Path,
    scores: Sequence[Scores],
    truth: Truth,
    generated: Callable[[int], Views],
    protocol: ViewProtocol,
    measures: Measures,
    alignment: Alignment,
    hashes: dict[str, str],
) -> None:
    """Write the tables and images of the finished folder."""
    shutil.rmtree(finished, ignore_errors=True)
    samples = finished / "samples"
    samples.mkdir(parents=True)
    measured = rows(scores, truth, protocol, measures)
    write_csv(finished / "results.csv", measured)
    (finished / "comparison.md").write_text(markdown([*measured, *published_rows()]))
    write_csv(finished / "by_view.csv", _by_view(scores, truth, protocol))
    write_claims(finished, claims_of(scores, protocol, measures))
    write_json(
        finished / "protocol.json",
        {
            "protocol": dataclasses.asdict(protocol),
            "digest": protocol.digest,
            "dataset": truth.dataset,
            "objects": list(truth.names),
            "models": hashes,
            "alignment": dataclasses.asdict(alignment),
        },
    )
    shown = range(min(_SHOWN, len(truth.names)))
    true, made = [truth.views(i) for i in shown], [generated(i) for i in shown]
    write_png(samples / "contact_sheet.png", views_sheet(true, made, protocol.azimuths))
    azimuth_chart(samples / "psnr_by_azimuth.png", scores, protocol.azimuths)
    turning = turntable(true, made)
    fps = max(4.0, protocol.views / 3)
    write_mp4(samples / "turntable.mp4", np.concatenate([turning] * _TURNS), fps)
    write_gif(samples / "turntable.gif", turning, fps)


def _by_view(scores: Sequence[Scores], truth: Truth, protocol: ViewProtocol) -> list[dict[str, float | str]]:
    return [
        {
            "subject": one.subject,
            "object": name,
            "azimuth": round(float(azimuth), 4),
            **{metric: round(float(values[number, view]), 6) for metric, values in one.values.items()},
        }
        for one in scores
        for number, name in enumerate(truth.names)
        for view, azimuth in enumerate(protocol.azimuths)
    ]


def claims_of(scores: Sequence[Scores], protocol: ViewProtocol, measures: Measures) -> list[Claim]:
    """Return the claims: sampled views and one-step estimates against the controls without a model, over objects."""
    by_name = {one.subject: one for one in scores}
    claims = []
    for subject in ("generated", ONE_STEP):
        for metric, unit, less in (("psnr", "dB", False), (measures.perceptor.name, "perceptual distance", True)):
            for control in MODEL_FREE:
                own, theirs = (by_name[name].by_object(metric).tolist() for name in (subject, control))
                kind = "novel views are nearer to the truth" if subject == "generated" else f"their {ONE_STEP}s are"
                claims.append(paired_claim(f"{kind} ({unit})", own, control, theirs, unit, less, protocol.digest))
    return claims


def _metrics(
    scores: Sequence[Scores], alignment: Alignment, truth: Truth, protocol: ViewProtocol, measures: Measures
) -> dict[str, float | int | str]:
    """Return flat metrics over novel views: `psnr`, `ssim`, … of the model, `psnr_<subject>` of the others."""
    metrics: dict[str, float | int | str] = {
        "objects": len(truth.names),
        "views": protocol.views,
        "dataset": truth.dataset,
        "protocol": protocol.name,
        "renderer": protocol.renderer,
        "clip_weights": measures.clip_label,
        "alignment_gain_db": alignment.gain,
        "alignment_ok": int(alignment.ok),
        "psnr_with_input_view": float(scores[0].values["psnr"].mean()),
    }
    for one in scores:
        suffix = "" if one.subject == "generated" else f"_{one.subject.replace(' ', '_').replace('-', '_')}"
        metrics |= {f"{metric}{suffix}": one.novel(metric) for metric in one.values}
    return metrics


def _summary(scores: Sequence[Scores], alignment: Alignment, perceptor: Perceptor) -> str:
    own = scores[0]
    others = ", ".join(f"{one.subject} {one.novel('psnr'):.2f}" for one in scores[1:])
    line = f"PSNR {own.novel('psnr'):.2f} dB ({others}), {perceptor.name} {own.novel(perceptor.name):.3f}"
    return line if alignment.ok else f"WRONG ORDER OF VIEWS? {alignment.message}. {line}"
