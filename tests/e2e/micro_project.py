"""A copy of this project with a preset whose stages take seconds, and commands that run in it and die on demand."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
COPIED = (
    "svd",
    "flows",
    "evaluation",
    "branches",
    "dvc.yaml",
    "params.yaml",
    "pyproject.toml",
    ".gitignore",
    ".dvcignore",
)
TRAINED = (
    "image_pretraining",
    "video_pretraining",
    "high_quality_finetuning",
    "image_to_video",
    "multiview_finetuning",
)
PATIENCE = 1500


def micro_preset(**overrides: Any) -> dict[str, Any]:
    """The preset `tiny` at the smallest size that runs every stage; `a__b=1` changes the value at a.b."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "presets" / "tiny.yaml").read_text())
    values["name"] = "micro"
    values["sources"] |= {"paths": [], "sources_per_shard": 1}
    values["sources"]["synthetic"] |= {
        "train_videos": 5,
        "test_videos": 1,
        "scenes_per_video": 4,
        "height": 64,
        "width": 96,
    }
    values["compute"]["curation"]["workers"] = 1
    values["curation"]["filters"] = {}
    values["encoders"] |= {"toy_iterations": 4, "toy_width": 32}
    values["model"]["unet"] |= {"block_out_channels": [32, 32], "attention_levels": [False, True], "head_channels": 16}
    values["model"]["unet"] |= {"cross_attention_dim": 32}
    values["autoencoder"] |= {"iterations": 4, "temporal_iterations": 2, "batch_size": 4, "discriminator_start": 0}
    values["autoencoder"] |= {"height": 32, "width": 48, "crop": None}
    values["compute"]["autoencoder"] = {"checkpoint_every": 2}
    values["latents"] |= {"geometries": [{"frames": 5, "height": 32, "width": 48}], "windows": 1}
    values["orbits"] = {"objects": 2, "views": 3, "size": 32}
    for stage in TRAINED:
        phase = values[stage]["phases"][-1] | {"iterations": 6, "batch_size": 2, "height": 32, "width": 48}
        frames = 1 if stage == "image_pretraining" else 4
        square = {"height": 32, "width": 32, "frames": 3} if stage == "multiview_finetuning" else {"frames": frames}
        values[stage] |= {"phases": [phase | square], "warmup": 0, "validation_samples": 2}
    values["compute"]["training"] |= {"sample_steps": 2, "validate_every": 3, "checkpoint_every": 1}
    for stage, frames in (("camera_lora", 4), ("frame_interpolation", 5), ("threshold_calibration", 4)):
        values[stage]["phases"][0] |= {"height": 32, "width": 48, "frames": frames}
    values["threshold_calibration"]["prompts"] = 2
    ucf101 = {"samples": 3, "frames": 4, "height": 32, "width": 48, "resized": [32, 48], "cropped": [32, 43]}
    values["evaluation"]["ucf101"] |= ucf101 | {"controls": ["noise"]}
    values["compute"]["evaluation"]["ucf101"]["batch_size"] = 3
    values["evaluation"]["ucf101"]["sampling"]["steps"] = 2
    judged = {"prompts": 4, "training_clips": 12, "training_steps": 4}
    values["evaluation"]["recognition"] |= judged
    values["evaluation"]["image_to_video"] |= {"clips": 2, "motion_clips": 1, "buckets": [0, 255]}
    values["evaluation"]["branches"] |= {"lora_clips": 2, "interpolation_clips": 2}
    for stage, key in (("recognition", "sampling"), ("image_to_video", "sampling"), ("branches", "lora_sampling")):
        values["evaluation"][stage][key]["steps"] = 2
    values["evaluation"]["multiview"] |= {"objects": 1, "views": 3, "size": 32}
    values["evaluation"]["multiview"]["sampling"]["steps"] = 2
    for path, value in overrides.items():
        *parents, last = path.split("__")
        place = values
        for name in parents:
            place = place[name]
        place[last] = value
    return values


def _hear_interrupts() -> None:
    """Undo what a shell does to what it runs in the background, the tests for example: there Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Project:
    """A project folder with its own git and DVC repositories."""

    root: Path

    @property
    def outputs(self) -> Path:
        """Where the micro preset's stages publish."""
        return self.root / "outputs" / "micro"

    @property
    def work(self) -> Path:
        """Where they keep work in progress."""
        return self.root / "work" / "micro"

    def environment(self, **more: str) -> dict[str, str]:
        """Variables of a user's shell: this project's code, its own Prefect home, no server."""
        foreign = ("PREFECT_", "MLFLOW_", "AWS_", "SVD_", "COV_", "PYTHONDONTWRITEBYTECODE")
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        code = f"{self.root}{os.pathsep}{self.root / '.faults'}"
        env |= {"PYTHONPATH": code, "PATH": f"{BIN}{os.pathsep}{env['PATH']}", "OMP_NUM_THREADS": "1"}
        env |= {
            "PREFECT_HOME": str(self.root.with_name(f"{self.root.name}.prefect")),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }
        env |= {f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        env |= {"PYTHONPYCACHEPREFIX": str(ROOT / ".cache" / "pycache")}  # importing takes 6 s without bytecode
        return env | {"DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"} | more

    def copy(self, folder: Path) -> Project:
        """The same project elsewhere, with its outputs and DVC cache, without its MLflow runs."""
        shutil.copytree(self.root, folder, symlinks=True, ignore=shutil.ignore_patterns(".local", "work"))
        return Project(folder)

    def lock(self) -> dict[str, Any]:
        """The stages of dvc.lock."""
        found: dict[str, Any] = yaml.safe_load((self.root / "dvc.lock").read_text())["stages"]
        return found

    def forget(self, *stages: str) -> None:
        """As if these stages had never run."""
        left = {name: entry for name, entry in self.lock().items() if name not in stages}
        (self.root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": left}, sort_keys=False))
        for stage in stages:
            shutil.rmtree(self.outputs / stage)

    def runs(self) -> list[Run]:
        """All MLflow runs of the project."""
        client = self.client()
        experiment = client.get_experiment_by_name("stable-video-diffusion")
        return list(client.search_runs([experiment.experiment_id], max_results=1000))

    def client(self) -> MlflowClient:
        """MLflow's client on the project's SQLite file."""
        return MlflowClient(f"sqlite:///{self.root / '.local' / 'mlflow.db'}")

    def start(self, *command: str, **env: str) -> Running:
        """Start a command in a process group of its own; its output goes to a file."""
        log = self.root.with_name(f"{self.root.name}.log")
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, cwd=self.root, env=self.environment(**env), stdin=subprocess.DEVNULL,
                stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_hear_interrupts,
            )  # fmt: skip
        return Running(process, log)

    def run(self, *command: str, code: int = 0, **env: str) -> str:
        """Run a command to its end; fails unless it exits with `code`. Returns what it said."""
        return self.start(*command, **env).finish(code)


@dataclass(frozen=True)
class Running:
    """A command that runs, as the leader of its process group."""

    process: subprocess.Popen[bytes]
    log: Path

    def finish(self, code: int = 0) -> str:
        """Wait for the end; the output."""
        try:
            found = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        said = self.log.read_text(errors="replace")
        assert found == code, f"{self.process.args!r} exited with {found}:\n{said[-6000:]}"
        return said

    def kill(self) -> None:
        """SIGKILL to the whole group: nobody gets to clean up."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; fails when the command ends before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"ended too early:\n{self.log.read_text(errors='replace')[-6000:]}"
            assert time.monotonic() < deadline, f"never happened:\n{self.log.read_text(errors='replace')[-6000:]}"
            time.sleep(0.02)

    def kill_when(self, condition: Callable[[], bool]) -> None:
        """SIGKILL to the group as soon as `condition` holds."""
        self.until(condition)
        self.kill()


FAULTS = """
import os, pathlib, signal
plain = pathlib.Path.rename
def rename(self, target):
    if str(target) == os.environ.get("DIE_PUBLISHING"):
        os.killpg(0, signal.SIGKILL)
    return plain(self, target)
pathlib.Path.rename = rename
"""


def make_project(folder: Path, **overrides: Any) -> Project:
    """A copy of the project at `folder` with the preset `micro` selected."""
    folder.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    for name in ("presets", "samples"):
        (folder / name).mkdir()
    shutil.copy(ROOT / "samples" / "README.md", folder / "samples")
    for preset in (ROOT / "presets").glob("*.yaml"):
        shutil.copy(preset, folder / "presets")
    (folder / "presets" / "micro.yaml").write_text(yaml.safe_dump(micro_preset(**overrides), sort_keys=False))
    (folder / "params.yaml").write_text("preset: micro\n")
    (folder / ".faults").mkdir()
    (folder / ".faults" / "sitecustomize.py").write_text(FAULTS)
    project = Project(folder)
    project.run("git", "init", "-q", ".")
    project.run("dvc", "init", "-q")
    project.run("git", "add", ".")
    project.run("git", "commit", "-qm", "all")
    return project


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills once for all processes of a test session."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / f"{name}.made").exists():
            shutil.rmtree(base / name, ignore_errors=True)
            make(base / name)
            (base / f"{name}.made").touch()
    return base / name


def undisturbed(factory: pytest.TempPathFactory) -> Project:
    """A project in which `svd pipeline` ran from the beginning to the end."""
    return Project(shared(factory, "undisturbed", lambda folder: make_project(folder).run("svd", "pipeline")))
