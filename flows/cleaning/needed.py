"""The DVC hashes that must stay: of lock files here, in git and in the store, and behind registered models.

Every `md5` in a lock file counts, whatever it is of: too much is kept rather than too little.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.lineage.objects import Missing, Objects
from flows.lineage.records import Records
from flows.places import WORK
from flows.recording.results_store import LOCKS
from flows.recording.work import DELIVERED
from flows.tracking.runs import tracking_uri
from svd.core.errors import UserError


@dataclass(frozen=True)
class Needed:
    """Hashes of files and folders that must stay; absent: folders whose list is nowhere, so that nothing is left."""

    hashes: frozenset[str]
    absent: frozenset[str]


def hashes_in(text: str | bytes, where: str) -> Iterator[str]:
    """Yield every md5 in a lock file or a `.dvc` file; raises UserError that names `where` for anything else."""
    try:
        content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        raise UserError(f"{where}: not a lock file of DVC; what it needs is unknown, so nothing is removed") from None
    yield from _md5s(content)


def _md5s(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(md5 := value.get("md5"), str):
            yield md5
        for inner in value.values():
            yield from _md5s(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _md5s(inner)


def _is_lock(path: str) -> bool:
    return path.endswith(".dvc") or Path(path).name == "dvc.lock"


def _git(*arguments: str) -> bytes:
    result = subprocess.run(["git", *arguments], capture_output=True, check=False)
    if result.returncode:
        raise UserError(f"git {arguments[0]}: {result.stderr.decode(errors='replace').strip()}; nothing is removed")
    return result.stdout


def here() -> Iterator[str]:
    """Yield the hashes that the working folder's lock files need, and outputs that wait to be recorded."""
    names = {str(lock) for lock in LOCKS} | {str(path) for path in Path().glob("*.dvc")}
    if Path(".git").exists():
        found = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard").decode().split("\0")
        names |= set(filter(_is_lock, found))
    for name in sorted(filter(lambda name: Path(name).is_file(), names)):
        yield from hashes_in(Path(name).read_bytes(), name)
    for note in WORK.glob(f"*/*/*/{DELIVERED}"):
        yield str(json.loads(note.read_text())["md5"])


def in_git() -> Iterator[str]:
    """Yield the hashes that the lock files of all branches, tags, remotes' branches, worktrees and experiments need."""
    if not Path(".git").exists():
        return
    refs = _git("for-each-ref", "--format=%(objectname)").decode().split()
    worktrees = _git("worktree", "list", "--porcelain").decode().splitlines()
    refs += [line.removeprefix("HEAD ") for line in worktrees if line.startswith("HEAD ") and set(line[5:]) != {"0"}]
    blobs: dict[str, str] = {}
    for ref in dict.fromkeys(refs):
        if _git("cat-file", "-t", f"{ref}^{{}}").strip() != b"commit":
            continue
        for entry in _git("ls-tree", "-r", "-z", "--full-tree", ref).decode().split("\0"):
            about, _, path = entry.partition("\t")
            if _is_lock(path):
                blobs.setdefault(about.split()[2], f"{ref[:12]}:{path}")
    for blob, where in blobs.items():
        yield from hashes_in(_git("cat-file", "blob", blob), where)


def of_models(records: Records) -> Iterator[str]:
    """Yield the hashes of what the runs behind registered versions have read and made, back to the sources."""
    for run in records.behind_models():
        yield from (*run.inputs.values(), *run.outputs.values())


def require_known(tops: Collection[str], records: Records) -> None:
    """Raise UserError when MLflow knows nothing of what the lock files name: it is another one, as when none is set.

    What only registered models need would look unneeded.
    """
    if tops and not records.makes_any(tops):
        raise UserError(
            f"MLflow at {tracking_uri()} knows of no run that made anything that the lock files name, so nothing is "
            "removed: set MLFLOW_TRACKING_URI to the one that has the models"
        )


def expand(tops: Iterable[str], objects: Objects) -> Needed:
    """Return the hashes with all files of the folders among them.

    Raises svd.core.retries.Unreachable when a list may be in a remote that doesn't answer.
    """
    whole, absent = set(tops), set[str]()
    for md5 in sorted(md5 for md5 in whole if md5.endswith(".dir")):
        try:
            whole.update(objects.tree(md5).values())
        except Missing:
            absent.add(md5)
    return Needed(frozenset(whole), frozenset(absent))
