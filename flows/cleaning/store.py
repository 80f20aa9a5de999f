"""The store and DVC's cache as `svd gc` sees them: listed with sizes and ages through DVC's own file systems."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from dvc.repo import Repo

from flows.cleaning.kinds import Kind, Thing, stale_work
from flows.cleaning.needed import Needed, hashes_in
from flows.recording.dvc import STORE_REMOTE, store_remote
from flows.running.lease import CLEANING, dead_seconds
from svd.core.errors import UserError
from svd.core.retries import Unreachable

OBJECTS = ("files", "md5")
REMOVERS = 16  # threads


class Files:
    """Files below a root on some file system, by their relative paths, as they were when this was made."""

    def __init__(self, fs: Any, root: str, now: float) -> None:
        self._fs, self.root = fs, root
        self.things = {thing.name: thing for thing in self._list(now)}

    def _list(self, now: float) -> Iterator[Thing]:
        with self._in_one_line("listed"):
            for path, about in self._details():
                yield Thing(self._fs.relpath(path, self.root), int(about["size"]), now - _changed(about))

    @contextlib.contextmanager
    def _in_one_line(self, done: str) -> Iterator[None]:
        """Raise UserError for a server that refuses, Unreachable for one that doesn't answer."""
        try:
            yield
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise UserError(
                f"{self.root} can't be {done}: {error}; docs/stores.md has the rights that are needed"
            ) from None
        except (OSError, BotoCoreError, ClientError) as error:
            raise Unreachable(f"{self.root} can't be {done}: {error}") from None

    def _details(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._fs.protocol == "local":
            yield from ((path, self._fs.info(path)) for path in self._fs.find(self.root))
            return
        self._fs.fs.invalidate_cache()
        try:
            yield from self._fs.fs.find(self.root, detail=True).items()
        except FileNotFoundError:  # nothing was stored so far
            return

    def read(self, name: str) -> bytes:
        """Return the content of a file; raises FileNotFoundError when it was removed meanwhile."""
        with self._in_one_line("read"), self._fs.open(self._fs.join(self.root, name), "rb") as stream:
            return bytes(stream.read())

    def remove(self, names: list[str]) -> None:
        """Delete files, one by one: where many go with one request, s3fs doesn't say which of them were refused."""
        paths = [self._fs.join(self.root, name) for name in names]
        with self._in_one_line("cleaned"), ThreadPoolExecutor(REMOVERS) as pool:
            list(pool.map(self._remove, paths))

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # somebody else was faster
            self._fs.fs.rm_file(path)


def _changed(about: dict[str, Any]) -> float:
    """Return the time of the last change, in seconds since 1970; unknown: now, so that it stays."""
    value = about.get("LastModified", about.get("mtime"))
    if isinstance(value, datetime):
        return value.timestamp()
    return float(value) if value is not None else time.time()


def cache_files(repo: Repo, now: float, say: Callable[[str], None]) -> Files:
    """List DVC's cache on this machine; nothing of one outside the project, where other projects have their data."""
    odb = repo.cache.local
    files = Files(odb.fs, odb.path, now)
    if not Path(odb.path).resolve().is_relative_to(Path(repo.dvc_dir).resolve()):
        say(f"DVC's cache is {odb.path}, outside of this project: others may need what is there, so it is left alone")
        files.things = {}
    return files


def store_files(repo: Repo, store: str, now: float) -> Files:
    """List the whole store."""
    repo.config["remote"][STORE_REMOTE] = store_remote(store)
    remote = repo.cloud.get_remote(STORE_REMOTE)
    return Files(remote.fs, remote.fs.parent(remote.path), now)


def object_hash(name: str) -> str | None:
    """Return the hash that an object's path `…/ab/cdef` stands for; None for other files."""
    *_, first, rest = ("", *PurePosixPath(name).parts)
    md5 = first + rest
    plain = md5.removesuffix(".dir")
    return md5 if len(first) == 2 and len(plain) == 32 and set(plain) <= set("0123456789abcdef") else None


def unneeded(title: str, files: Files, prefix: tuple[str, ...], needed: Needed, old: float) -> Kind:
    """Sort the objects below `prefix`: those that are needed or younger than `old` seconds stay.

    Lists of folders go before their files, so that a kill in between leaves no list without its files.
    """

    def remove(names: list[str]) -> None:
        files.remove([name for name in names if name.endswith(".dir")])
        files.remove([name for name in names if not name.endswith(".dir")])

    objects = [t for name, t in files.things.items() if PurePosixPath(name).parts[: len(prefix)] == prefix]
    hashed = [thing for thing in objects if object_hash(thing.name)]
    return Kind(title, remove).sort(
        hashed, lambda thing: object_hash(thing.name) not in needed.hashes and thing.age > old
    )


def needed_by_store(files: Files) -> Iterator[str]:
    """Yield the hashes that the store's lock files name, and outputs that were pushed and wait to be recorded."""
    for name in files.things:
        parts = PurePosixPath(name).parts
        if parts[-1] == "dvc.lock":  # wherever it is: a preset may be called "dvc" or "work", too
            with contextlib.suppress(FileNotFoundError):  # the preset was given up meanwhile
                yield from hashes_in(files.read(name), f"{files.root}/{name}")
        elif parts[0] == "work" and parts[-1] == "manifest.json" and (made := _manifest(files, name).get("output")):
            yield str(made)


def _manifest(files: Files, name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.read(name))
        return content if isinstance(content, dict) else {}
    except (ValueError, FileNotFoundError):  # nobody can go on with it, or its stage has ended meanwhile
        return {}


def work_in_store(files: Files, lost: set[str], old: float) -> Kind:
    """Look at work in progress in the store, a thing per stage and digest: what changed last tells its age."""
    parts: dict[PurePosixPath, list[Thing]] = {}
    for name, thing in files.things.items():
        path = PurePosixPath(name)
        if path.parts[0] == "work" and len(path.parts) > 4:
            parts.setdefault(PurePosixPath(*path.parts[:4]), []).append(thing)
    works: dict[tuple[str, str], list[Thing]] = {}
    for folder, some in parts.items():
        thing = Thing(str(folder), sum(one.size or 0 for one in some), min(one.age for one in some))
        works.setdefault((folder.parts[1], folder.parts[2]), []).append(thing)

    def remove(names: list[str]) -> None:
        for name in names:
            inside = [one.name for one in parts[PurePosixPath(name)]]
            manifest = f"{name}/manifest.json"  # first: nobody must go on with half of the rest
            files.remove([one for one in inside if one == manifest])
            files.remove([one for one in inside if one != manifest])

    things = [thing for some in works.values() for thing in some]
    return Kind("work in progress in the store", remove).sort(things, stale_work(works, lost, old))


def held_leases(files: Files) -> dict[str, dict[str, Any]]:
    """Return what is written in the leases that have a holder; but for garbage collection's own."""
    found = {}
    for name in files.things:
        parts = PurePosixPath(name).parts
        if parts[0] == "leases" and name.endswith(".json") and parts[1:] != (f"{CLEANING}.json",):
            try:
                content = json.loads(files.read(name))
                if content.get("owner"):
                    found[name] = content
            except (FileNotFoundError, ValueError):  # being written
                continue
    return found


def alive(files: Files, say: Callable[[str], None]) -> list[str]:
    """Return the owners of leases that are renewed as often as living holders do; no clocks are compared."""
    before = held_leases(files)
    if not before:
        return []
    seconds = max(map(dead_seconds, before.values()))
    say(f"{len(before)} leases are held in the store; waiting {seconds:.0f} s to see which of them are renewed")
    time.sleep(seconds)
    after = held_leases(files)
    return sorted(f"{name} by {lease['owner']}" for name, lease in after.items() if lease != before.get(name))


def require_quiet(files: Files | None, running: list[str], say: Callable[[str], None]) -> None:
    """Raise UserError while something runs that may be writing what looks unneeded."""
    busy = running or (alive(files, say) if files else [])
    if busy:
        raise UserError(f"nothing is removed while {', '.join(busy)} runs; wait for the end or stop it")
