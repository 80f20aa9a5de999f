"""DVC from Python: whether a stage changed, its hashes in `dvc.lock`, and pulling inputs by their hashes.

`dvc repro` and the flows keep the same `dvc.lock`: the stage entry that `commit` writes is the one `dvc repro` writes.
`preset` is always the preset's name; only `dvc repro` itself takes it from params.yaml.

Where a store is set (`SVD_STORE`), `<store>/dvc` is the remote of these functions; it is configured in this process
alone, so a default remote of the user's own stays the one of `dvc push` and `dvc pull`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from dvc.dvcfile import load_file
from dvc.exceptions import CollectCacheError, DvcException
from dvc.parsing.context import Context
from dvc.repo import Repo
from dvc.ui import ui
from dvc_data.hashfile.build import build
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta
from dvc_data.hashfile.transfer import TransferResult

from flows.places import Place
from flows.rendering.dvc_yaml import BRANCH, MAIN
from flows.stages import BRANCHES
from flows.tracking.runs import Lineage
from svd import storage
from svd.core.errors import UserError
from svd.core.retries import Transient, retrying

logger = logging.getLogger(__name__)
STORE_REMOTE = "svd-store"
TRANSFER_LOG = logging.getLogger("dvc_data.hashfile.transfer")
TIMEOUTS = {"connect_timeout": 5, "read_timeout": 20}
_PASSING = (OSError, BotoCoreError, ClientError, TimeoutError)


def open_repo(store: str | None = None) -> Repo:
    """Open the DVC repository in this folder, with or without git; waits while another process holds its lock.

    store: its `dvc` is the default remote of this repository object; nothing is written into the configuration.
    """
    folder = Path.cwd()
    config: dict[str, Any] = {"core": {} if (folder / ".git").exists() else {"no_scm": True}}
    if store:
        config["core"]["remote"] = STORE_REMOTE
        config["remote"] = {STORE_REMOTE: store_remote(store)}
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


def store_remote(store: str) -> dict[str, Any]:
    """Return DVC's settings of the remote in a store: `<store>/dvc`, what comes from there is verified by its hash.

    Credentials and the endpoint of S3 come from the environment, as everywhere.
    """
    url = storage.join(store, "dvc")
    if not storage.is_remote(store):
        return {"url": str(storage.local_path(url).absolute()), "verify": True}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options = {"url": url, "verify": True} | (TIMEOUTS if url.startswith("s3://") else {})
    return options | ({"endpointurl": endpoint} if endpoint and url.startswith("s3://") else {})


def stored_object(store: str, md5: str) -> str:
    """Return the location of an object in the store's remote by its hash, which for a folder ends in `.dir`."""
    return storage.join(store, "dvc", "files", "md5", md5[:2], md5[2:])


def has_remote() -> bool:
    """Return whether a default DVC remote is configured for this project."""
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


def push(items: list[Lineage], store: str | None = None) -> int:
    """Send folders by hash to the store (default: DVC's default remote); return the number of objects that were sent.

    Only objects that the remote lacks travel, a folder's list last: a push that was killed goes on where it was. Raises
    svd.core.retries.Unreachable when the remote doesn't answer in all attempts, UserError when it refuses, and for a
    folder that isn't whole afterwards because DVC's cache here has lost some of it.
    """
    if store:
        items = [item for item in items if not storage.exists(stored_object(store, item.md5))]
    if not items:
        return 0
    with open_repo(store) as repo:
        for item in items:
            _complete_cache(repo, item)
        objects, remote = _objects(repo, items), _remote(repo)
        sent = _transfer(lambda: repo.cloud.push(objects, odb=remote), "push to", store)
        for item in items:
            _require_arrived(repo, item, remote)
        return sent


def _complete_cache(repo: Repo, item: Lineage) -> None:
    """Take what the cache has lost of a folder from the folder itself, if that is still what `item` says."""
    with repo.lock:
        out = _at_hash(repo, item)
        if out.changed_cache() and not out.workspace_status():
            out.commit()


def _require_arrived(repo: Repo, item: Lineage, remote: Any) -> None:
    """Raise UserError when the list of a folder is not in the remote: DVC sends none for a folder with lost files."""
    if remote.exists(item.md5):
        return
    lost = _not_in_cache(repo, item)
    raise UserError(
        f"{item.path} at {item.md5}: {len(lost)} of its files are neither in DVC's cache here nor in the remote, "
        f"{', '.join(lost[:1])} for example; it was not pushed. Push it where it was made, or make it again"
    )


def _not_in_cache(repo: Repo, item: Lineage) -> list[str]:
    return sorted(str(one.value) for one in _objects(repo, [item]) if not repo.cache.local.exists(str(one.value)))


def _fetch(repo: Repo, item: Lineage, store: str | None) -> None:
    objects = _objects(repo, [item])
    _transfer(lambda: repo.cloud.pull(objects, odb=_remote(repo)), f"pull {item.path} from", store)


def _remote(repo: Repo) -> Any:
    """Return the object database of the default remote; its S3 client gives up early, whole transfers are retried."""
    odb = repo.cloud.get_remote_odb()
    if odb.fs.protocol == "s3":
        odb.fs.fs_args.setdefault("config_kwargs", {})["retries"] = {"total_max_attempts": 2}
        odb.fs.fs.retries = 1
    return odb


class _Failures(logging.Filter):
    """The reasons why objects didn't arrive, which DVC only logs: kept here instead."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[BaseException] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Take the record's exception; nothing else is logged there as an error."""
        if record.exc_info and record.exc_info[1]:
            self.reasons.append(record.exc_info[1])
        return not record.exc_info


def _transfer(action: Callable[[], TransferResult], what: str, store: str | None) -> int:
    """Call `action` until all its objects have arrived; return their number.

    Before each attempt the store is asked for anything, with the patience of `svd.storage`: a server that is restarted
    or hangs is waited for there, for minutes and not for ever.
    """
    what = f"DVC can't {what} {store or 'its default remote'}"

    def attempt() -> int:
        if store:
            storage.exists(stored_object(store, "0" * 32))
        failures = _Failures()
        TRANSFER_LOG.addFilter(failures)
        try:
            result = action()
        except (PermissionError, FileNotFoundError) as error:
            raise UserError(f"{what}: {error}") from error
        except UserError:
            raise
        except _PASSING as error:
            raise Transient(str(error).strip() or type(error).__name__) from error
        finally:
            TRANSFER_LOG.removeFilter(failures)
        if result.failed:
            raise _judged(failures.reasons, f"{what}: {len(result.failed)} objects did not arrive")
        return len(result.transferred)

    return retrying(attempt, what, 4 if store else None)


def _judged(reasons: list[BaseException], what: str) -> Exception:
    """Return the error for objects that failed: what another attempt can't mend is the user's to mend."""
    for reason in reasons:
        if isinstance(reason, PermissionError | FileNotFoundError):
            return UserError(f"{what}: {reason}")
    return Transient(f"{what}: {reasons[0]}" if reasons else what)


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


def pull(items: list[Lineage], store: str | None = None) -> int:
    """Bring the folders `items` to exactly their hashes, from DVC's cache or the remote; return how many were brought.

    store: where they are (default: DVC's default remote). Every object is compared with its hash. A folder that is
    something else now, and not in DVC's cache, gets another name: nobody else may have it. Raises UserError when
    one is in neither or damaged, svd.core.retries.Unreachable when the store doesn't answer in all attempts.
    """
    brought = 0
    if not items:  # below DVC's lock is taken, which `dvc repro` holds while it runs a stage
        return 0
    with open_repo(store) as repo, repo.lock:
        for item in items:
            out = _at_hash(repo, item)
            if not out.workspace_status():
                continue
            if out.changed_cache():
                _fetch(repo, item, store)
            if out.changed_cache():  # DVC drops an object that isn't what its hash says
                raise UserError(_damaged(repo, item, store))
            _put_aside(repo, item)
            out.checkout(force=True)
            brought += 1
    return brought


def _put_aside(repo: Repo, item: Lineage) -> None:
    folder = Path(item.path)
    if not folder.is_dir() or repo.cache.local.exists(found := hash_folder(folder).md5):
        return
    aside = folder.with_name(f"{folder.name}.{found[:8]}")
    folder.rename(aside)
    logger.warning("%s was never recorded; it is %s now, and %s takes its place", folder, aside, item.md5)


def _damaged(repo: Repo, item: Lineage, store: str | None) -> str:
    """Return what to do about objects that aren't what their hashes say, which DVC has dropped from the cache.

    The folder's list must go with them: it stands for the presence of all its files.
    """
    remote = _remote(repo)
    names = [*_not_in_cache(repo, item), item.md5]
    places = [remote.fs.unstrip_protocol(remote.oid_to_path(name)) for name in dict.fromkeys(names)]
    return (
        f"{item.path} at {item.md5} is damaged in {store or 'the DVC remote'}; delete {', '.join(places)} and push it "
        "again where it is whole"
    )
