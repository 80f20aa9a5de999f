"""The table of stages: one row says all there is to know of a stage outside its own code.

`dvc.yaml`, `branches/dvc.yaml`, `prefect.yaml`, the Prefect flows and `svd stages` are made from these rows. After a
change of a row run `svd platform render`, which writes the three files anew. Nothing heavy is imported here: the table
is read by `svd stages` and by the completion of the shell.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, cast, get_args

from svd.core.errors import UserError

if TYPE_CHECKING:
    from svd.stage import Report, StageContext


Pool = Literal["cpu", "gpu"]
POOLS = get_args(Pool)


@dataclass(frozen=True)
class Resources:
    """Requests of a stage's pod on Kubernetes; a process on a laptop takes what there is.

    cpu: cores requested; memory and memory_limit: request and limit, as Kubernetes writes them; gpus: whole GPUs.
    """

    cpu: int
    memory: str
    memory_limit: str
    gpus: int = 0


CPU_POD = Resources(cpu=2, memory="4Gi", memory_limit="16Gi")
GPU_POD = Resources(cpu=8, memory="64Gi", memory_limit="128Gi", gpus=1)


@dataclass(frozen=True)
class Stage:
    """A row of the table.

    name: of the stage, its flow, its deployment and its folder in outputs/PRESET.
    description: one line for people.
    function: `module:function`, called as `function(context) -> Report`.
    hours: the flow is stopped after this time.
    inputs: the stages whose outputs it reads.
    options: dotted paths in the preset that its result depends on; a change of one runs the stage again. What only
        says how to compute (the section `compute`) is never listed.
    pool: Prefect's work pool. resources: of its pod; None: the usual ones of the pool.
    model: the name under which what it trains is registered. base: the stage whose U-Net the trained adapters are for.
    distributed: it trains on all ranks of a launcher; other stages run in the first process alone.
    external: its options may name files outside the project, which `svd inventory` then lists.
    branch: beside the main chain: not in `full-pipeline`, but in branches/dvc.yaml.
    nightly: `nightly-evaluation` runs it.
    losses: it writes losses.csv, which `dvc plots` draws.
    keep: its output is not deleted before it runs again, because people add to it between two runs.
    reads: patterns of `<input>/<file>` (`*` stands for slashes, too), when it reads only these files of its inputs: a
        machine that lacks an input brings nothing else of it. An input that no pattern names is read whole.
    streams: patterns of `<input>/<file>` that it can read from a store by ranges (`compute.<stage>.stream`). They are
        named by their content.
    """

    name: str
    description: str
    function: str
    hours: int
    inputs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    pool: Pool = "gpu"
    resources: Resources | None = None
    model: str | None = None
    base: str | None = None
    distributed: bool = False
    external: bool = False
    branch: bool = False
    nightly: bool = False
    losses: bool = False
    keep: bool = False
    reads: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()

    def load(self) -> Callable[[StageContext], Report]:
        """Import and return the stage's function. Imported late, because some stages import torch."""
        module, _, name = self.function.partition(":")
        return cast("Callable[[StageContext], Report]", getattr(importlib.import_module(module), name))

    @property
    def pod(self) -> Resources:
        """Return the resources of its pod: those of its pool where the row says nothing."""
        return self.resources or (GPU_POD if self.pool == "gpu" else CPU_POD)

    def reads_part_of(self, name: str) -> bool:
        """Return whether it reads only some files of the input `name`."""
        return any(pattern.startswith((f"{name}/", "*")) for pattern in self.reads)

    def reads_file(self, name: str, relative: str) -> bool:
        """Return whether it reads the file `relative` of the input `name`."""
        return not self.reads_part_of(name) or any(fnmatchcase(f"{name}/{relative}", p) for p in self.reads)

    def streams_part_of(self, name: str) -> bool:
        """Return whether it can read files of the input `name` from a store."""
        return any(pattern.startswith(f"{name}/") for pattern in self.streams)

    def streams_file(self, name: str, relative: str) -> bool:
        """Return whether it can read the file `relative` of the input `name` from a store."""
        return any(fnmatchcase(f"{name}/{relative}", pattern) for pattern in self.streams)


_NETWORKS = ("autoencoder", "encoders")
_SHARDS = ("latents/shards/*",)


def _training(section: str) -> tuple[str, ...]:
    """Return the options of a training that reads latents; `section` is its own part of the preset."""
    return "seed", "model", section, "curation.captions"


_LIST = (
    Stage(
        "sources",
        "Make the synthetic worlds and gather the footage.",
        "svd.sources.stage:run",
        hours=6,
        options=("name", "seed", "sources"),
        pool="cpu",
        external=True,
    ),
    Stage(
        "encoders",
        "Get the text and image encoders: released weights, or a toy CLIP trained on synthetic captions.",
        "svd.training.encoders:run",
        hours=6,
        options=("seed", "encoders", "model.unet.cross_attention_dim"),
        external=True,
    ),
    Stage(
        "curation",
        "Cut, clip, caption, score and filter raw videos into a catalogue and shards (§3, App. C).",
        "svd.curation.stage:run",
        hours=240,
        inputs=("sources", "encoders"),
        options=("seed", "curation", "encoders"),
        pool="cpu",
        external=True,
    ),
    Stage(
        "autoencoder",
        "Train the autoencoder, or the temporal decoder of a released one (VideoLDM §3.1.1).",
        "svd.training.autoencoder:run",
        hours=72,
        inputs=("curation",),
        options=("seed", "autoencoder", "model.autoencoder"),
        external=True,
    ),
    Stage(
        "latents",
        "Cache latents, text and image embeddings of all kept clips.",
        "svd.latents.stage:run",
        hours=96,
        inputs=("curation", "autoencoder", "encoders"),
        options=("seed", "latents", "curation.captions"),
    ),
    Stage(
        "image-pretraining",
        "Stage I: switch the image model to the EDM framework and its resolution (§3.2, D.2).",
        "svd.training.stages:run_image_pretraining",
        hours=240,
        inputs=("latents", *_NETWORKS),
        options=_training("image_pretraining"),
        streams=_SHARDS,
        distributed=True,
        external=True,
        losses=True,
    ),
    Stage(
        "video-pretraining",
        "Stage II: video pretraining on the curated data (§3.3, D.2).",
        "svd.training.stages:run_video_pretraining",
        hours=2400,
        inputs=("latents", *_NETWORKS, "image-pretraining"),
        options=_training("video_pretraining"),
        streams=_SHARDS,
        distributed=True,
        losses=True,
    ),
    Stage(
        "high-quality-finetuning",
        "Stage III: finetuning on high-quality clips (§3.4, D.3).",
        "svd.training.stages:run_high_quality_finetuning",
        hours=720,
        inputs=("latents", *_NETWORKS, "video-pretraining"),
        options=_training("high_quality_finetuning"),
        streams=_SHARDS,
        model="svd-text-to-video",
        distributed=True,
        losses=True,
    ),
    Stage(
        "image-to-video",
        "Finetune the text-to-video base to image-to-video (§4.3, D.4).",
        "svd.training.stages:run_image_to_video",
        hours=720,
        inputs=("latents", *_NETWORKS, "video-pretraining"),
        options=_training("image_to_video"),
        streams=_SHARDS,
        model="svd-image-to-video",
        distributed=True,
        losses=True,
    ),
    Stage(
        "orbits",
        "Render the orbits that the multi-view model is trained on (§4.5, D.6).",
        "svd.orbits.stage:run",
        hours=240,
        options=("seed", "orbits"),
        pool="cpu",
        external=True,
    ),
    Stage(
        "multiview-finetuning",
        "Finetune image-to-video to multi-view generation (§4.5, D.6).",
        "svd.training.stages:run_multiview_finetuning",
        hours=72,
        inputs=("orbits", *_NETWORKS, "image-to-video"),
        options=("seed", "model", "multiview_finetuning"),
        model="svd-multi-view",
        distributed=True,
        losses=True,
    ),
    Stage(
        "ucf101-evaluation",
        "UCF-101 zero-shot Fréchet distance of the text-to-video model (E.4).",
        "evaluation.frechet.ucf101:run",
        hours=96,
        inputs=("sources", *_NETWORKS, "high-quality-finetuning"),
        options=("seed", "evaluation.ucf101"),
        external=True,
        nightly=True,
        reads=("sources/metrics.json", "sources/ucf101_fixture/*"),
    ),
    Stage(
        "recognition-evaluation",
        "Is what the prompt says in the clip? Judged by classifiers, beside controls.",
        "evaluation.recognition.text_to_video:run",
        hours=24,
        inputs=("sources", *_NETWORKS, "video-pretraining", "high-quality-finetuning"),
        options=("seed", "high_quality_finetuning.phases", "evaluation.recognition"),
        reads=("sources/metrics.json", "sources/truth.json", "sources/train/*.mp4", "sources/test/*.mp4"),
    ),
    Stage(
        "image-to-video-evaluation",
        "First frame, later frames and motion bucket of the image-to-video model (§4.2).",
        "evaluation.recognition.image_to_video:run",
        hours=24,
        inputs=("latents", *_NETWORKS, "image-to-video"),
        options=("seed", "image_to_video.phases", "evaluation.image_to_video"),
    ),
    Stage(
        "multiview-benchmark",
        "Multi-view benchmark on held-out objects (§4.5, Fig. 10).",
        "evaluation.multiview.benchmark:run",
        hours=24,
        inputs=("multiview-finetuning", *_NETWORKS),
        options=("seed", "evaluation.multiview"),
        external=True,
        nightly=True,
    ),
    Stage(
        "report",
        "One self-contained HTML page of everything that was made and measured.",
        "evaluation.report.page:run",
        hours=2,
        inputs=(
            "sources",
            "curation",
            "autoencoder",
            "latents",
            "image-pretraining",
            "video-pretraining",
            "high-quality-finetuning",
            "image-to-video",
            "multiview-finetuning",
            "ucf101-evaluation",
            "recognition-evaluation",
            "image-to-video-evaluation",
            "multiview-benchmark",
        ),
        options=("name",),
        pool="cpu",
        nightly=True,
        reads=("*.json", "*.csv", "*.png", "*.jpg", "*.gif", "*/samples/*.mp4"),
    ),
    Stage(
        "camera-lora",
        "Train one camera-motion LoRA per motion on temporal attention (§4.3.1, D.4.2).",
        "svd.training.stages:run_camera_lora",
        hours=72,
        inputs=("latents", *_NETWORKS, "image-to-video"),
        options=_training("camera_lora"),
        streams=_SHARDS,
        model="svd-camera-lora",
        base="image-to-video",
        distributed=True,
        branch=True,
    ),
    Stage(
        "frame-interpolation",
        "Finetune to frame interpolation (§4.4, D.5).",
        "svd.training.stages:run_frame_interpolation",
        hours=96,
        inputs=("latents", *_NETWORKS, "high-quality-finetuning"),
        options=_training("frame_interpolation"),
        streams=_SHARDS,
        model="svd-frame-interpolation",
        distributed=True,
        branch=True,
    ),
    Stage(
        "branch-evaluation",
        "Camera LoRAs and frame interpolation on test clips (§4.3.1, §4.4).",
        "evaluation.recognition.branches:run",
        hours=24,
        inputs=("latents", *_NETWORKS, "image-to-video", "camera-lora", "frame-interpolation"),
        options=("seed", "camera_lora", "frame_interpolation.phases", "evaluation.branches"),
        branch=True,
    ),
    Stage(
        "threshold-calibration",
        "Choose the filters' thresholds by preference between small models (§3.3, E.2.2).",
        "evaluation.calibration.stage:run",
        hours=2400,
        inputs=("curation", *_NETWORKS, "image-pretraining"),
        options=("seed", "model", "encoders", "latents", "threshold_calibration", "curation.captions"),
        distributed=True,
        external=True,
        branch=True,
        keep=True,
    ),
)
STAGES = {stage.name: stage for stage in _LIST}
PIPELINE = tuple(stage.name for stage in _LIST if not stage.branch)
BRANCHES = tuple(stage.name for stage in _LIST if stage.branch)
NIGHTLY = tuple(stage.name for stage in _LIST if stage.nightly)
EXTERNAL = tuple(stage.name for stage in _LIST if stage.external)
OPTIONAL_INPUTS = ("report",)  # stages that make do with the inputs that are there


def require_training(name: str) -> None:
    """Raise UserError, which lists the trainings that can be profiled, unless the stage `name` is one of them."""
    if not find_stage(name).distributed:
        trainings = ", ".join(stage.name for stage in _LIST if stage.distributed)
        raise UserError(
            f"stage '{name}' trains no diffusion model, so it can't be profiled; those that do: {trainings}"
        )


def find_stage(name: str) -> Stage:
    """Return the stage called `name`; raises UserError that lists the stages when there is none."""
    if name not in STAGES:
        raise UserError(f"no stage '{name}'; stages: {', '.join(STAGES)}")
    return STAGES[name]
