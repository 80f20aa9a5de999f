"""The kinds of things that `svd gc` looks at: what there is of each, what stays, what goes, and how it is removed."""

from __future__ import annotations

import contextlib
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from flows.places import OUTPUTS, WORK, Place
from flows.recording.dvc import hash_folder
from flows.recording.work import close_work
from flows.stages import STAGES
from svd.core.files import Held, exclusive

CACHES = Path(".cache")


@dataclass(frozen=True)
class Thing:
    """Something that can be kept or removed: its name, bytes (None: not measured), and seconds since a change."""

    name: str
    size: int | None
    age: float


@dataclass
class Kind:
    """All things of a kind, by whether they stay; `remove` deletes things by name."""

    title: str
    remove: Callable[[list[str]], None]
    kept: list[Thing] = field(default_factory=list)
    doomed: list[Thing] = field(default_factory=list)

    def sort(self, things: Iterable[Thing], goes: Callable[[Thing], bool]) -> Kind:
        """Put things where they belong; returns itself."""
        for thing in things:
            (self.doomed if goes(thing) else self.kept).append(thing)
        return self


def folder_thing(folder: Path, now: float) -> Thing:
    """Return a folder, or a file, as a thing: all its bytes, the age of what changed last in it."""
    stats = [path.lstat() for path in (folder, *folder.rglob("*"))]
    sizes = sum(about.st_size for about in stats if not stat.S_ISDIR(about.st_mode))
    return Thing(str(folder), sizes, now - max(about.st_mtime for about in stats))


def remove_folders(names: list[str]) -> None:
    """Delete folders or files; what is gone already is fine."""
    for name in names:
        shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink(missing_ok=True)


def lost_presets() -> set[str]:
    """Return the presets that git once knew and that are neither here nor in any branch any more.

    A name that never was a preset's file, such as that of `svd curate --name`, is not among them.
    """
    if not Path(".git").exists():
        return set()
    once = _names("log", "--all", "--format=", "--name-only", "--diff-filter=A", "--", "presets/*.yaml")
    heads = subprocess.run(
        ["git", "for-each-ref", "--format=%(refname)", "refs/heads", "refs/remotes"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    alive = {path.stem for path in Path("presets").glob("*.yaml")}
    for head in heads:
        alive |= _names("ls-tree", "-r", "--name-only", head, "presets/")
    return once - alive


def _names(*arguments: str) -> set[str]:
    found = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.splitlines()
    return {Path(line).stem for line in found if line.endswith(".yaml")}


def results(lost: set[str], absent: frozenset[str], now: float, old: float) -> Kind:
    """Look at outputs/: results of presets that are gone, unless something in them changed in the last `old` seconds.

    absent: hashes that are needed and lie nowhere else; a folder that has one of them stays.
    """

    def goes(thing: Thing) -> bool:
        gone = Path(thing.name).parts[1] in lost and thing.age > old
        return gone and hash_folder(Path(thing.name)).md5 not in absent

    return Kind("results in outputs/", remove_folders).sort(
        (folder_thing(folder, now) for folder in sorted(OUTPUTS.glob("*/*/"))), goes
    )


def caches(now: float, old: float) -> Kind:
    """Look at .cache/: copies of files in S3 and the like, which are fetched again when they are needed."""
    files = sorted(path for path in CACHES.rglob("*") if path.is_file() and not path.is_symlink())
    return Kind("copies in .cache/", remove_folders).sort(
        (folder_thing(path, now) for path in files), lambda thing: thing.age > old
    )


def stale_work(works: dict[tuple[str, str], list[Thing]], lost: set[str], old: float) -> Callable[[Thing], bool]:
    """Return which unfinished work goes: older than `old` seconds, and not a stage's newest, which may still go on.

    works: by preset and stage. Of presets that are gone the newest goes as well.
    """
    newest = {
        min(things, key=lambda thing: thing.age).name
        for (preset, stage), things in works.items()
        if preset not in lost and stage in STAGES
    }
    return lambda thing: thing.age > old and thing.name not in newest


def work_here(lost: set[str], now: float, old: float) -> Kind:
    """Look at work/: unfinished work of stages on this machine."""
    works: dict[tuple[str, str], list[Thing]] = {}
    for folder in sorted(WORK.glob("*/*/*/")):
        preset, stage = folder.parts[-3:-1]
        if stage in STAGES:  # not what waits for MLflow in work/tracking
            works.setdefault((preset, stage), []).append(folder_thing(folder, now))
    things = [thing for some in works.values() for thing in some]
    return Kind("work in progress here", _close).sort(things, stale_work(works, lost, old))


def _close(names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(Held), exclusive(Place.of_work(Path(name)).lock, wait=False):
            close_work(Path(name))


def running_here() -> list[str]:
    """Return what runs on this machine, by the locks of stages and pipelines: `latents of tiny (process 12)`."""
    found = []
    for lock in WORK.glob("*/.*.lock"):
        place = Place(lock.parent.name, lock.name[1:].removesuffix(".lock"))
        try:
            with exclusive(lock, wait=False):
                pass
        except Held as error:
            found.append(f"{place.stage} of {place.preset} (process {error.holder})")
    return found
