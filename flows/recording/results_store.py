"""The store of results: `<store>/dvc` holds all versions of all outputs, by hash; a pointer names the newest.

A store is `s3://bucket/prefix` or a folder that machines share. Its parts:

* `dvc/` is a DVC remote (flows/recording/dvc.py);
* `<preset>/dvc.lock` and `<preset>/branches/dvc.lock` are the pointer: the entries of stages as DVC wrote them when
  their outputs were recorded;
* `work/` holds work in progress (flows/recording/work_store.py), `leases/` who executes what (flows/running/lease.py).

The pointer changes by conditional writes only. Its first line holds the highest token of each lease that may write it:
an executor whose lease was taken over can't publish, however late it wakes up.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.places import Place
from flows.recording import dvc as versioning
from flows.rendering.dvc_yaml import BRANCH, MAIN
from flows.stages import BRANCHES, Stage, find_stage
from flows.tracking.runs import Lineage
from svd import storage
from svd.core.errors import UserError
from svd.core.files import write_text
from svd.core.retries import Unreachable

logger = logging.getLogger(__name__)
LOCKS = (MAIN.with_suffix(".lock"), BRANCH.with_suffix(".lock"))
HEADER = "# leases: "
ATTEMPTS = 50


class LeaseLost(UserError):
    """Another executor has taken over, or may have: this one stops and publishes nothing."""


class LeaseExpired(LeaseLost):
    """The lease was not renewed in time: the store was away, or this process stood still. A new try may get it."""


@dataclass(frozen=True)
class Fence:
    """The right to write the pointer: a lease's name and its token, which grows whenever the lease changes hands."""

    lease: str
    token: int


@dataclass(frozen=True)
class _Pointer:
    """A stored lock file: its tokens by lease, its content, and its version (None: not stored)."""

    tokens: dict[str, int]
    content: dict[str, Any]
    version: str | None = None

    @property
    def stages(self) -> dict[str, Any]:
        return self.content.get("stages") or {}

    def text(self) -> str:
        return HEADER + json.dumps(self.tokens, sort_keys=True) + "\n" + yaml.safe_dump(self.content, sort_keys=False)


def store_root(option: str | None) -> str | None:
    """Return the store of this run: `option`, else `SVD_STORE`; None: results stay on this machine and in DVC."""
    return option or os.environ.get("SVD_STORE") or None


def _lock_of(stage: str) -> Path:
    return LOCKS[stage in BRANCHES]


def _read(root: str, preset: str, lock: Path) -> _Pointer:
    location = storage.join(root, preset, lock.as_posix())
    try:
        version = storage.version(location)
        text = storage.read_bytes(location).decode()
        first, _, _ = text.partition("\n")
        tokens = json.loads(first.removeprefix(HEADER)) if first.startswith(HEADER) else {}
        return _Pointer(tokens, yaml.safe_load(text) or {}, version)
    except FileNotFoundError:
        return _Pointer({}, {"schema": "2.0", "stages": {}})
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{location}: not a lock file of DVC ({error}); delete it and run the pipeline again") from None


def _update(root: str, preset: str, lock: Path, fence: Fence, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the stages of a stored lock file under `fence`; several writers do it one after the other."""
    location = storage.join(root, preset, lock.as_posix())
    for _ in range(ATTEMPTS):
        found = _read(root, preset, lock)
        if found.tokens.get(fence.lease, 0) > fence.token:
            raise LeaseLost(f"the lease '{fence.lease}' of preset '{preset}' was lost; nothing is published")
        stages = dict(found.stages)
        change(stages)
        tokens = found.tokens | {fence.lease: fence.token}
        if found.version and stages == found.stages and tokens == found.tokens:
            return
        new = _Pointer(tokens, found.content | {"stages": stages})
        try:
            storage.replace(location, new.text().encode(), found.version)
            return
        except storage.Conflict:
            continue
    raise Unreachable(f"{location}: other runs keep changing it; let one of them finish first")


def fence_off(root: str, preset: str, fence: Fence, stages: Iterable[Stage]) -> None:
    """Note the token of a new holder in the pointer, before it works: earlier holders can't write it from now on."""
    for lock in sorted({_lock_of(stage.name) for stage in stages}):
        _update(root, preset, lock, fence, lambda stages: None)


def highest_token(root: str, preset: str, lease: str) -> int:
    """Return the highest token of a lease in the pointer: somebody may have deleted the lease, which counts from it."""
    return max(_read(root, preset, lock).tokens.get(lease, 0) for lock in LOCKS)


def keep_entry(root: str, preset: str, stage: str, fence: Fence) -> None:
    """Point the store at the outputs that this machine's dvc.lock has for `stage`; raises LeaseLost."""
    lock = _lock_of(stage)
    entry = _local(lock)["stages"][stage]
    _update(root, preset, lock, fence, lambda stages: stages.update({stage: entry}))


def _local(lock: Path) -> dict[str, Any]:
    found = yaml.safe_load(lock.read_text()) if lock.exists() else None
    return {"schema": "2.0"} | (found or {}) | {"stages": (found or {}).get("stages") or {}}


def fetch_locks(root: str, preset: str) -> None:
    """Take over the pointer as DVC's lock files where there are none (a fresh pod)."""
    if any(lock.exists() for lock in LOCKS):
        return
    adopt_locks(root, preset)


def adopt_locks(root: str, preset: str, only: str | None = None) -> None:
    """Take over the pointer's entries (of the stage `only`) into DVC's lock files here, over what they say."""
    for lock in LOCKS:
        stored = _read(root, preset, lock).stages
        entries = {name: entry for name, entry in stored.items() if only in (None, name)}
        if entries:
            here = _local(lock)
            write_text(lock, yaml.safe_dump(here | {"stages": here["stages"] | entries}, sort_keys=False))


def stored_output(root: str, preset: str, stage: str) -> Lineage | None:
    """Return the output of a stage that the pointer names; None when there is none."""
    entry = _read(root, preset, _lock_of(stage)).stages.get(stage)
    if not entry or not entry.get("outs"):
        return None
    out = entry["outs"][0]
    path = Place(preset, stage).output
    return Lineage(stage, str(path), out["md5"], out.get("size"), out.get("nfiles"))


def stored_outputs(root: str, preset: str, stages: Iterable[str]) -> list[Lineage]:
    """Return the outputs of stages as the pointer names them, without those that it doesn't name."""
    found = {stage: stored_output(root, preset, stage) for stage in stages}
    for stage in (name for name, output in found.items() if output is None):
        logger.info("%s/%s is not in the store, the local folder is used", preset, stage)
    return [output for output in found.values() if output]


def fetch_inputs(root: str, preset: str, stages: Iterable[str]) -> None:
    """Bring the outputs of stages as the pointer names them; one that it doesn't name stays as it is here."""
    versioning.pull(stored_outputs(root, preset, stages), root)


def stored_files(root: str, output: Lineage) -> list[dict[str, str]]:
    """Return the files of a stored folder: `relpath` and `md5` of each."""
    files: list[dict[str, str]] = json.loads(storage.read_bytes(versioning.stored_object(root, output.md5)))
    return files


def stored_file(root: str, preset: str, stage: str, relative: str) -> str:
    """Return the location of one file of a stage's newest output; raises FileNotFoundError when it isn't stored."""
    output = stored_output(root, preset, find_stage(stage).name)
    if output is None:
        raise FileNotFoundError(f"{root}: the output of '{stage}' of preset '{preset}' is not stored")
    for item in stored_files(root, output):
        if item["relpath"] == relative:
            return versioning.stored_object(root, item["md5"])
    raise FileNotFoundError(f"{output.path} in {root} has no {relative}")


def ensure_stored(root: str, output: Lineage) -> None:
    """Push an output of an earlier run that the store lacks, from this machine or the user's own DVC remote."""
    if not storage.exists(versioning.stored_object(root, output.md5)):
        versioning.pull([output])
        versioning.push([output], root)
