"""DVC from Python: whether a stage changed, its hashes in `dvc.lock`, and pulling inputs by their hashes.

`dvc repro` and the flows keep the same `dvc.lock`: the stage entry that `commit` writes is the one `dvc repro` writes.
`preset` is always the preset's name; only `dvc repro` itself takes it from params.yaml.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvc.dvcfile import load_file
from dvc.exceptions import CollectCacheError, DvcException
from dvc.parsing.context import Context
from dvc.repo import Repo
from dvc.ui import ui
from dvc_data.hashfile.build import build
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta

from flows.places import Place
from flows.rendering.dvc_yaml import BRANCH, MAIN
from flows.stages import BRANCHES
from flows.tracking.runs import Lineage
from svd.core.errors import UserError

logger = logging.getLogger(__name__)


def open_repo() -> Repo:
    """Open the DVC repository in this folder, with or without git; waits while another process holds its lock."""
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    folder = Path.cwd()
    config = None if (folder / ".git").exists() else {"core": {"no_scm": True}}
    try:
        return Repo(str(folder), config=config, _wait_for_lock=True)
    except DvcException as error:
        raise UserError(f"{folder}: not a DVC repository ({error}); run the command in the project's folder") from None


def _stage(repo: Repo, name: str, preset: str) -> Any:
    """Return DVC's stage `name` of `preset`, whichever preset params.yaml names: other runs here may use another."""
    file = load_file(repo, str(BRANCH if name in BRANCHES else MAIN))
    file.resolver.context.merge_update(Context({"preset": preset}), overwrite=True)
    return file.stages[name]


def _lineage(entry: Any) -> Lineage:
    path = str(entry.def_path)
    size, files = (entry.meta.size, entry.meta.nfiles) if entry.meta else (None, None)
    return Lineage(Path(path).name, path, entry.hash_info.value, size, files)


def changed(name: str, preset: str) -> bool:
    """Return whether the stage's command, dependencies, parameters or outputs differ from `dvc.lock`.

    A folder that is recorded there but not on this machine counts as unchanged: whoever needs it pulls it.
    """
    with open_repo() as repo, repo.lock:
        return bool(_stage(repo, name, preset).changed(allow_missing=True))


def record(name: str, preset: str, outputs: list[Lineage], known: Mapping[str, Lineage]) -> None:
    """Write the stage's entry in `dvc.lock`, as `dvc repro` would, from hashes alone: the data may be on another node.

    `known` holds the hashes of data inputs by path; the inventory and parameters are hashed here.
    """
    made = {item.path: item for item in outputs}
    with open_repo() as repo, repo.lock:
        stage = _stage(repo, name, preset)
        for dep in stage.deps:
            if str(dep.def_path) in known:
                _set_hash(dep, known[str(dep.def_path)])
            else:
                dep.save()
        for out in stage.outs:
            _set_hash(out, made[str(out.def_path)])
        stage.md5 = stage.compute_md5()
        stage.dump(update_pipeline=False)


def _set_hash(entry: Any, item: Lineage) -> None:
    entry.hash_name = "md5"  # DVC takes an output that an old lock does not name for one of its former kind
    entry.hash_info = HashInfo("md5", item.md5)
    entry.meta = Meta(size=item.size, nfiles=item.files, isdir=item.md5.endswith(".dir"))


def lineage(name: str, preset: str) -> tuple[list[Lineage], list[Lineage]]:
    """Return the hashes of the stage's inputs and outputs as `dvc.lock` has them."""
    with open_repo() as repo:
        stage = _stage(repo, name, preset)
        inputs = [d for d in stage.deps if d.hash_info and str(d.def_path).startswith("outputs/")]
        return [_lineage(d) for d in inputs], [_lineage(out) for out in stage.outs if out.hash_info]


def hash_folder(path: Path) -> Lineage:
    """Return the DVC hash of a folder as it is now. Takes no lock, so a stage that `dvc repro` runs may call it."""
    with open_repo() as repo, ui.progress(desc=f"hashing {path}", unit="file", leave=False, delay=2) as bar:
        folder, cache = str(path.absolute()), repo.cache.local
        callback = bar.as_callback()
        _, meta, obj = build(cache, folder, repo.fs, "md5", ignore=repo.dvcignore, dry_run=True, callback=callback)
        return Lineage(path.name, str(path), str(obj.hash_info.value), meta.size, meta.nfiles)


def save_outputs(name: str, preset: str) -> list[Lineage]:
    """Hash the stage's outputs into DVC's cache without touching `dvc.lock`; what a stage on another node returns."""
    with open_repo() as repo, repo.lock:
        stage = _stage(repo, name, preset)
        stage.save_outs()
        stage.commit()
        return [_lineage(out) for out in stage.outs]


def has_remote() -> bool:
    """Return whether a default DVC remote is configured."""
    with open_repo() as repo:
        return bool(repo.config["core"].get("remote"))


def set_local_remote(name: str, url: str | None, endpoint: str = "") -> None:
    """Make `url` this machine's default remote (.dvc/config.local), or forget it when `url` is None.

    A default remote that the project or the user chose is left as it is.
    """
    with open_repo() as repo:
        if repo.config["core"].get("remote") not in (None, name):
            return
        with repo.config.edit("local") as local:
            local["remote"].pop(name, None)
            local["core"].pop("remote", None)
            if url:
                local["remote"][name] = {"url": url} | ({"endpointurl": endpoint} if endpoint else {})
                local["core"]["remote"] = name


def push(items: list[Lineage]) -> int:
    """Send folders to the default remote by hash; return the number of objects that were sent."""
    with open_repo() as repo:
        result = repo.cloud.push(_objects(repo, items))
        if result.failed:
            raise UserError(f"DVC could not push {len(result.failed)} objects; check the remote and run `dvc push`")
        return len(result.transferred)


def _at_hash(repo: Repo, item: Lineage) -> Any:
    """Return DVC's output for the path of `item`, set to the hash of `item`."""
    place = Place.of_output(item.path)
    out = _stage(repo, place.stage, place.preset).outs[0]
    _set_hash(out, item)
    out.obj = None
    return out


def _objects(repo: Repo, items: list[Lineage]) -> set[HashInfo]:
    """Return all objects of the folders; raises UserError when one's list is neither here nor in the remote."""
    objects: set[HashInfo] = set()
    for item in items:
        try:
            objects |= _at_hash(repo, item).get_used_objs()[None]
        except CollectCacheError:
            message = f"{item.path} at {item.md5} is neither on this machine nor in the DVC remote; push it there"
            raise UserError(message) from None
    return objects


def pull(items: list[Lineage]) -> int:
    """Bring the folders `items` to exactly their hashes, from DVC's cache or the remote; return how many were brought.

    Raises UserError when an object is in neither.
    """
    brought = 0
    with open_repo() as repo, repo.lock:
        for item in items:
            out = _at_hash(repo, item)
            if not out.workspace_status():
                continue
            if out.changed_cache() and repo.cloud.pull(_objects(repo, [item])).failed:
                raise UserError(f"{item.path} at {item.md5} is not whole in the DVC remote; push it again")
            out.checkout(force=True)
            brought += 1
    return brought
