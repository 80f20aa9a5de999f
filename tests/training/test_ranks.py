"""`svd stage` on several ranks: started by itself, by torchrun, by srun; always one run, one result, one set of
weights."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy_training import PHASE, toy_preset, write_cache, write_toy_autoencoder

from svd.config import Preset
from svd.core.errors import UserError
from svd.stage import Report, StageContext
from svd.training import ranks
from svd.training.launch import on_all_ranks
from svd.training.stages import run_image_pretraining

BIN = Path(sys.executable).parent
PATIENCE = 900
MODEL = "video-pretraining/unet/diffusion_pytorch_model.safetensors"


def preset(devices: int, iterations: int = 4, **more: object) -> Preset:
    phases = [{**PHASE, "iterations": iterations}, {**PHASE, "iterations": 2}]
    fixed = {"optimizer": "adamw", "warmup": 0, "decay": "none", "ema_decay": 0.9, "strategy": "ddp"}
    return toy_preset(phases=phases, devices=devices, **(fixed | more))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose preset `one` has trained `video-pretraining` by the command, on one rank."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        settle(folder, patch)
        subprocess.run([BIN / "dvc", "init", "-q", "--no-scm"], check=True)
        write_preset("one", preset(1))
        inputs = {"autoencoder": write_toy_autoencoder(Path("outputs/one/autoencoder"))}
        inputs["latents"] = write_cache(Path("outputs/one/latents"), inputs["autoencoder"])
        Path("outputs/one/encoders").mkdir()
        image = StageContext(preset(1), inputs, Path("outputs/one/image-pretraining"), folder / "image")
        image.work.mkdir()
        before = dict(os.environ)
        run_image_pretraining(image)
        assert dict(os.environ) == before, "the next stage of this process would take itself for a rank"
        finish(stage("video-pretraining", "one"))
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy with a preset `two`, for two ranks, whose inputs are those of `one`."""
    folder = tmp_path / "project"
    shutil.copytree(trained, folder)
    settle(folder, monkeypatch)
    write_preset("two", preset(2))
    shutil.copytree("outputs/one", "outputs/two")
    shutil.rmtree("outputs/two/video-pretraining")
    return folder


def settle(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(folder)
    patch.setenv("CUDA_VISIBLE_DEVICES", "")
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)


def write_preset(name: str, values: Preset) -> None:
    Path(f"{name}.yaml").write_text(yaml.safe_dump(values.model_dump(mode="json") | {"name": name}))


def stage(name: str, preset_name: str, *launcher: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    command = [*launcher, str(BIN / "svd"), "stage", name, "--preset", f"{preset_name}.yaml"]
    return subprocess.Popen(command, env=os.environ | (env or {}), stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> str:
    text = process.communicate(timeout=PATIENCE)[1].decode()
    assert process.returncode == 0, text[-4000:]
    return text


def runs(key: str) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(f"sqlite:///{Path('.local/mlflow.db').absolute()}")
    experiment = client.get_experiment_by_name("stable-video-diffusion")
    found = client.search_runs([experiment.experiment_id])
    return [run for run in found if run.data.tags["svd.run_key"].startswith(key)]


def free_port() -> int:
    """A port whose neighbour 10000 higher exists as well."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            if (port := probe.getsockname()[1]) < 50_000:
                return int(port)


def deviation(first: Path, second: Path, start: Path) -> float:
    """How far two trainings from the same start differ, as a share of what they moved, in the mean over all weights.

    In the mean, because AdamW turns the rounding noise of biases without gradient (a normalisation follows) into steps.
    """
    one, two, before = load_file(first), load_file(second), load_file(start)
    assert one.keys() == two.keys()
    shared = sorted(one.keys() & before.keys())
    apart, moved = (torch.cat([(one[k] - other[k]).abs().flatten() for k in shared]) for other in (two, before))
    assert moved.mean() > 1e-3, "training moved nothing that could differ"
    return float(apart.mean() / moved.mean())


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("launcher", ["own", "torchrun", "srun"])
def test_two_ranks_of_the_command_equal_one(project: Path, launcher: str) -> None:
    if launcher == "own":
        # what a batch script of several tasks sets must not keep the command from starting its ranks itself
        finish(stage("video-pretraining", "two", env={"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}))
    elif launcher == "torchrun":
        torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "--no-python"]
        finish(stage("video-pretraining", "two", *torchrun))
    else:
        shared = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0"}
        shared |= {"SLURM_NTASKS_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        places = [shared | {"SLURM_PROCID": k, "SLURM_LOCALID": k} for k in ("0", "1")]
        processes = [stage("video-pretraining", "two", env=place) for place in places]
        with ThreadPoolExecutor(2) as pool:  # both are read at a time: a full pipe would stop the second one
            list(pool.map(finish, processes))
    start = project / "outputs/one" / MODEL.replace("video", "image")
    assert deviation(project / "outputs/one" / MODEL, project / "outputs/two" / MODEL, start) < 1e-3
    found = runs("video-pretraining")
    assert [run.info.status for run in found] == ["FINISHED"] * 2
    assert all("val_loss" in run.data.metrics for run in found)
    assert not list((project / "work/two").glob("*/*"))


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE)
def test_two_ranks_that_are_terminated_save_their_step_and_go_on(project: Path) -> None:
    write_preset("two", preset(2, 60, checkpoint_every=1000, validate_every=1000))
    process = stage("video-pretraining", "two")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and "val_loss" not in journal():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=PATIENCE)[1].decode()
    assert process.returncode == 128 + signal.SIGTERM, text[-4000:]
    (saved,) = project.glob("work/two/video-pretraining/*/phase-0/step=*.ckpt")
    assert 1 <= int(saved.stem.removeprefix("step=")) < 60
    finish(stage("video-pretraining", "two"))
    assert (project / "outputs/two" / MODEL).exists() and not list((project / "work/two").glob("*/*"))


def journal() -> str:
    """What the present runs have told MLflow."""
    return "".join(path.read_text() for path in Path("work/tracking").glob("*/journal.jsonl"))


@on_all_ranks("video_pretraining")
def report_place(context: StageContext, note: str) -> Report:
    context.tracker.log_metrics({"rank": float(ranks.rank())}, step=1)
    return Report({"note": note, "ranks": os.environ["WORLD_SIZE"], "pid": os.getpid()}, "")


@on_all_ranks("video_pretraining")
def fail_on_the_second(context: StageContext, how: str) -> None:
    if ranks.rank() == 0:
        time.sleep(600)
    if how == "mistake":
        raise UserError("clips: too few")
    os.kill(os.getpid(), signal.SIGKILL)


class Numbers:
    """A tracker that keeps scalars."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.seen.append({**metrics, "step": step})


def context_of(folder: Path, devices: int, **more: object) -> StageContext:
    return StageContext(preset(devices, **more), {}, folder / "output", folder / "work", Numbers())  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_first_rank_answers_and_reports_outside(tmp_path: Path) -> None:
    context = context_of(tmp_path, 2)
    report = report_place(context, "kept")
    assert (report.metrics["note"], report.metrics["ranks"]) == ("kept", "2")
    assert report.metrics["pid"] != os.getpid()
    assert context.tracker.seen == [{"rank": 0.0, "step": 1}]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^clips: too few$"):
        fail_on_the_second(context_of(tmp_path, 2), "mistake")
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        fail_on_the_second(context_of(tmp_path, 2), "death")


class Full(Numbers):
    """A tracker whose disk is full."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        raise OSError("no space left")


@pytest.mark.slow
def test_a_tracker_that_fails_ends_the_ranks(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no space left"):
        report_place(replace(context_of(tmp_path, 2), tracker=Full()), "")  # type: ignore[arg-type]


def test_several_nodes_need_a_launcher(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"video_pretraining.nodes is 4: .*torchrun --nnodes 4 --nproc-per-node 8"):
        report_place(context_of(tmp_path, 8, nodes=4), "")


FOLLOWER = """
from svd.training.ranks import await_first_rank
context = await_first_rank()
print(context and context.work, flush=True)
"""


@pytest.mark.parametrize("told", [True, False])
def test_the_other_ranks_wait_for_the_first_or_are_let_go(
    told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_store", cache(ranks._store.__wrapped__))
    port = str(free_port())
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "1", "RANK": "1"}
    follower = subprocess.Popen(
        [sys.executable, "-c", FOLLOWER], env=os.environ | place, stdout=subprocess.PIPE, text=True
    )
    for name, value in (place | {"LOCAL_RANK": "0", "RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    context = context_of(tmp_path, 2)
    with contextlib.suppress(UserError), ranks.leading():
        if not told:
            raise UserError("an input is missing")
        ranks.announce(context)
    assert follower.communicate(timeout=PATIENCE)[0].strip() == str(context.work if told else None)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (False, 0)),
        ({"LOCAL_RANK": "1", "RANK": "5"}, (True, 5)),
        ({"LOCAL_RANK": "1"}, (True, 1)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (False, 0)),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, (True, 3)),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (False, 0)),
    ],
)
def test_the_place_among_ranks(
    variables: dict[str, str], expected: tuple[bool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "RANK", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (ranks.launched(), ranks.rank()) == expected


def test_srun_without_tasks_per_node_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    with pytest.raises(UserError, match=r"srun: .*ntasks-per-node"), ranks.leading():
        pass


def test_the_tiny_preset_uses_one_device() -> None:
    values = yaml.safe_load((Path(__file__).parents[2] / "presets/tiny.yaml").read_text())
    compute = Preset.model_validate(values).compute
    assert all(compute.of(s).devices == 1 for s in values if isinstance(values[s], dict) and "phases" in values[s])
