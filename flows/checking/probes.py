"""What a stage needs of the machine it runs on, each tried once: a store, MLflow, a place to publish."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

from flows.checking.finding import Finding
from flows.places import OUTPUTS, WORK
from flows.running.runner import git_commit
from flows.tracking.mlflow_delivery import bound_requests, find_experiment
from flows.tracking.runs import EXPERIMENT, tracking_uri
from svd import storage
from svd.core.addresses import public_text
from svd.core.device import pick_device
from svd.core.errors import UserError
from svd.core.files import replace_folder

PAYLOAD = os.urandom(1 << 16)
TEXT = "§ é 漢"  # prompts, names of files and descriptions of models are in any language


def probe_store() -> str:
    """Write an object to SVD_STORE, read it back and remove it; raises UserError when another one comes back."""
    root = os.environ.get("SVD_STORE")
    if not root:
        return "none: SVD_STORE is not set, results stay on this machine"
    location = storage.join(root, "platform-check", uuid4().hex)
    begun = time.monotonic()
    storage.write_bytes(location, PAYLOAD)
    try:
        if storage.read_bytes(location) != PAYLOAD:
            raise UserError(f"{location}: other bytes came back than were written")
    finally:
        storage.delete(location)
    return f"{root}: written, read and removed in {time.monotonic() - begun:.2f} s"


def probe_mlflow() -> str:
    """Give MLflow a run with a text and a file, read both back and delete the run."""
    import mlflow

    bound_requests()
    client = mlflow.MlflowClient(tracking_uri())
    experiment = find_experiment(client, tracking_uri(), EXPERIMENT)
    run = client.create_run(experiment, run_name="platform-check").info.run_id
    begun = time.monotonic()
    try:
        client.set_tag(run, "probe", TEXT)
        if client.get_run(run).data.tags["probe"] != TEXT:
            raise UserError(f"'{TEXT}' came back as another text; its database needs the encoding UTF-8")
        with tempfile.TemporaryDirectory() as folder:
            sent = Path(folder) / "probe.bin"
            sent.write_bytes(PAYLOAD)
            client.log_artifact(run, str(sent))
            if Path(client.download_artifacts(run, sent.name, folder)).read_bytes() != PAYLOAD:
                raise UserError("other bytes came back than were logged")
        return f"an artifact logged and read in {time.monotonic() - begun:.2f} s"
    finally:
        client.set_terminated(run)
        client.delete_run(run)


def probe_publishing() -> str:
    """Publish a folder from work/ to outputs/ as a stage does, and remove it."""
    name = f".platform-check-{uuid4().hex}"
    made, published = WORK / name, OUTPUTS / name
    made.mkdir(parents=True)
    try:
        (made / "probe.bin").write_bytes(PAYLOAD)
        OUTPUTS.mkdir(exist_ok=True)
        replace_folder(made, published)
        if (published / "probe.bin").read_bytes() != PAYLOAD:
            raise UserError(f"{published}: other bytes than were published")
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(published, ignore_errors=True)
    same = WORK.stat().st_dev == OUTPUTS.stat().st_dev
    how = "by a rename" if same else "by copying: work/ and outputs/ are two file systems"
    return f"{how}; {shutil.disk_usage(WORK).free / 1e9:.0f} GB free"


def probe_code() -> str:
    """Say which commit runs, and on which device; raises UserError for a given GPU that torch can't see."""
    device, given = pick_device(), os.environ.get("NVIDIA_VISIBLE_DEVICES", "")  # a container runtime sets it
    if device == "cpu" and given not in ("", "none", "void"):
        raise UserError(f"the GPU {given} was given, but torch sees none; check driver and image")
    return f"commit {git_commit()}, networks run on {device}"


PROBES: dict[str, Callable[[], str]] = {
    "store": probe_store,
    "MLflow": probe_mlflow,
    "publishing": probe_publishing,
    "code": probe_code,
}


def run_probe(name: str, probe: Callable[[], str]) -> Finding:
    """Run a probe; whatever it raises is what it found."""
    try:
        return Finding(name, True, probe())
    except Exception as error:  # each probe reports by itself, and the next one goes on
        reason = public_text(str(error)).strip() or type(error).__name__
        return Finding(name, False, reason.splitlines()[0])


def run_probes() -> Iterator[Finding]:
    """Yield the finding of each probe."""
    for name, probe in PROBES.items():
        yield run_probe(name, probe)
