"""MLflow: every stage is a run nested under the pipeline's run; datasets carry DVC hashes, models are registered.

Nothing here talks to MLflow while a stage computes: operations go to a journal (flows/tracking/journal.py)
whose courier delivers them. `MLFLOW_TRACKING_URI` names the server; without it an SQLite file under `.local/` serves.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from flows.tracking.journal import Courier, Journal
from flows.tracking.mlflow_delivery import Delivery
from svd.core.addresses import public_address, public_values
from svd.core.files import Held, exclusive

EXPERIMENT = "stable-video-diffusion"
SPOOL = Path("work") / "tracking"
SEND_SECONDS = 120


def tracking_uri() -> str:
    """Return MLflow's address: `MLFLOW_TRACKING_URI`, or the SQLite file of the embedded default.

    User and password in the address of a server move to the variables that MLflow has for them: MLflow prints the
    address. Those of a database stay, so print `public_address` of what this returns.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return _without_login(uri)
    folder = Path(".local").absolute()
    folder.mkdir(exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def _without_login(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and "@" in parts.netloc:
        login, _, host = parts.netloc.rpartition("@")
        user, _, password = login.partition(":")
        uri = parts._replace(netloc=host).geturl()
        os.environ |= {"MLFLOW_TRACKING_USERNAME": unquote(user), "MLFLOW_TRACKING_PASSWORD": unquote(password)}
        os.environ["MLFLOW_TRACKING_URI"] = uri
    return uri


@dataclass(frozen=True)
class RunInfo:
    """The identity of a run: `key` is ours, made before MLflow knows of the run and found again by a tag."""

    key: str
    name: str
    parent: str | None = None
    tags: Mapping[str, str] | None = None
    params: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Lineage:
    """A dataset or folder that a run reads or writes: its name, path, DVC hash and size in bytes."""

    name: str
    path: str
    md5: str
    size: int | None = None
    files: int | None = None


def milliseconds() -> int:
    """Return the time, in milliseconds since 1970."""
    return int(time.time() * 1000)


class MlflowTracker:
    """A `svd.stage.Tracker` that writes to the journal of one run."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._seen = {(name, step) for entry in journal.entries("metrics") for name, _, _, step in entry["items"]}
        self._seen |= {tuple(entry["image"]) for entry in journal.entries("file") if "image" in entry}

    def _first_time(self, name: str, step: int) -> bool:
        """Return whether (name, step) is new: a resumed stage repeats the steps after its last checkpoint."""
        new = (name, step) not in self._seen
        self._seen.add((name, step))
        return new

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log scalars at a step; their time is now, whenever they arrive."""
        items = [
            [name, float(value), milliseconds(), step]
            for name, value in metrics.items()
            if self._first_time(name, step)
        ]
        if items:
            self._journal.append({"op": "metrics", "items": items})

    def log_cost(self, stage: str, hours: Mapping[str, float], prices: Mapping[str, float] | None) -> None:
        """Log what a stage of this pipeline has cost, by kind of hours; the sums over its stages follow from it."""
        entry = {"op": "cost", "stage": stage, "hours": dict(hours), "prices": dict(prices) if prices else None}
        self._journal.append(entry | {"time": milliseconds()})

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._journal.append({"op": "tags", "tags": dict(tags)})

    def log_image(self, key: str, image: np.ndarray, step: int) -> None:
        """Log an (H, W, 3) uint8 image; equal keys of different runs share a step slider in MLflow's charts."""
        if not self._first_time(key, step):
            return
        stamp = f"{key.replace('/', '~')}+step+{step}+timestamp+{milliseconds()}"
        stem = f"{stamp}+{hashlib.sha256(stamp.encode()).hexdigest()[:16]}"
        whole = Image.fromarray(image)
        small = whole.copy()
        small.thumbnail((256, 256))
        for name, content in ((f"{stem}.png", whole), (f"{stem}+compressed.webp", small)):
            target = self._journal.folder / "files" / "images" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            content.save(target)
            self._journal.append({"op": "file", "name": f"images/{name}", "folder": "images", "image": [key, step]})
        self._journal.append({"op": "tags", "tags": {"mlflow.loggedImages": "True"}})

    def log_file(self, path: Path, folder: str = "") -> None:
        """Log a file, shown under `folder` in the run's artifacts."""
        name = f"{folder}/{path.name}".lstrip("/")
        self._journal.keep_file(path, name)
        self._journal.append({"op": "file", "name": name, "folder": folder})

    def log_text(self, text: str, name: str) -> None:
        """Log a text as an artifact."""
        target = self._journal.folder / "files" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        self._journal.append({"op": "file", "name": name, "folder": str(Path(name).parent).lstrip(".")})

    def log_lineage(self, context: str, items: list[Lineage]) -> None:
        """Log datasets with their DVC hashes; `context` is `input` or `output`."""
        self._journal.append({"op": "lineage", "context": context, "items": [vars(item) for item in items]})

    def register_model(self, name: str, folders: Mapping[str, Path], settings: Mapping[str, Any]) -> None:
        """Register a model made of `folders` and point alias `candidate` at it.

        folders: `model` (what was trained), and for serving `autoencoder`, `encoders` and for adapters `base`.
        settings: `checkpoint` (flows.tracking.mlflow_delivery.checkpoint_digest), and for serving `task`
        (the stage), `preset` and `signature` (flows/serving/signature.py); `card` and `description`
        (flows/running/registered_card.py). Everything is read when it is delivered.
        """
        paths = {key: str(path.absolute()) for key, path in folders.items()}
        self._journal.append({"op": "model", "name": name, "folders": paths, "settings": public_values(settings)})


def flat_params(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested options as dotted names, as MLflow's compare page wants them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flat_params(value, f"{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            flat |= flat_params({str(i): item for i, item in enumerate(value)}, f"{name}.")
        else:
            flat[name] = value
    return flat


def _folder(spool: Path, key: str) -> Path:
    return spool / re.sub(r"[^\w.-]", "_", key)


def _lock(folder: Path) -> Path:
    """Return the lock of whoever writes or sends a journal; it ends with its process."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def tracked_run(info: RunInfo, *, spool: Path = SPOOL, patience: float = 20) -> Iterator[MlflowTracker]:
    """Open the run `info.key` (a second time: continue it), yield its tracker, end it as FINISHED, FAILED or KILLED."""
    folder = _folder(spool, info.key)
    with exclusive(_lock(folder)):
        journal = Journal(folder)
        start = {"op": "start", "key": info.key, "name": info.name, "parent": info.parent, "time": milliseconds()}
        params = flat_params(public_values(info.params or {}))
        journal.append(start | {"tags": dict(info.tags or {}), "params": params})
        courier = _courier(journal)
        status = "FAILED"
        try:
            yield MlflowTracker(journal)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            journal.append({"op": "end", "status": status, "time": milliseconds()})
            if courier.close(patience):
                _forget(journal, status)


def _courier(journal: Journal) -> Courier:
    return Courier(journal, Delivery(tracking_uri(), EXPERIMENT), f"MLflow at {public_address(tracking_uri())}")


def _forget(journal: Journal, status: str) -> None:
    """Remove a delivered journal, but for what a run that may be continued must know: what it has logged."""
    if status != "FINISHED":
        shutil.rmtree(journal.folder / "files")
        return
    shutil.rmtree(journal.folder)
    _lock(journal.folder).unlink(missing_ok=True)


def send_pending(spool: Path = SPOOL) -> tuple[int, int]:
    """Deliver what earlier runs left behind; journals that a living process still writes or sends are left alone.

    After two minutes in all the rest keeps waiting: a server that hangs must not hold up the next pipeline. Returns how
    many journals were delivered and how many still wait.
    """
    outcomes = []
    deadline = time.monotonic() + SEND_SECONDS
    for folder in sorted(spool.glob("*/")):
        with suppress(Held), exclusive(_lock(folder), wait=False):
            if folder.is_dir() and (journal := Journal(folder)).pending():
                outcomes.append(time.monotonic() < deadline and _send(journal))
    return sum(outcomes), len(outcomes) - sum(outcomes)


def _send(journal: Journal) -> bool:
    """Deliver a journal that nobody else has; return whether all of it arrived."""
    starts, ends = list(journal.entries("start")), list(journal.entries("end"))
    delivered = _courier(journal).close(patience=0)
    if delivered and ends and ends[-1]["time"] >= starts[-1]["time"]:
        _forget(journal, ends[-1]["status"])
    return delivered
