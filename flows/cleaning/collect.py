"""The plan of `svd gc`, and its execution."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from flows.cleaning import artifacts, kinds, needed, store
from flows.lineage.objects import Objects
from flows.lineage.records import Records
from flows.recording import dvc as versioning
from flows.running.lease import Lease, held_for_cleaning

DAY = 24 * 3600.0


@dataclass
class Plan:
    """What there is by kind, and the folders that something needs but that are nowhere any more."""

    kinds: list[kinds.Kind]
    absent: frozenset[str]

    def delete(self) -> None:
        """Remove what the plan says."""
        for kind in self.kinds:
            kind.remove([thing.name for thing in kind.doomed])


@contextmanager
def planned(days: float, root: str | None, delete: bool, say: Callable[[str], None] = print) -> Iterator[Plan]:
    """Yield the plan; DVC's lock is held until the end of the block, so that no stage is recorded meanwhile.

    With `delete` the store's lease for it is held, too: a stage that begins elsewhere waits, because what looks
    unneeded now may be what it makes. days: nothing that changed later than that is removed. root: the store, if there
    is one. Raises UserError when `delete` is set while something runs, and svd.core.retries.Unreachable when MLflow or
    the store can't be asked.
    """
    now, old = time.time(), days * DAY
    with versioning.open_repo() as repo, repo.lock, _alone(root, delete):
        records = Records()
        files = store.store_files(repo, root, now) if root else None
        if delete:
            store.require_quiet(files, kinds.running_here(), say)
        tops = {*needed.here(), *needed.in_git()}
        tops |= set(store.needed_by_store(files)) if files else set()
        needed.require_known(tops, records)
        whole = needed.expand(tops | set(needed.of_models(records)), Objects(repo, root))
        lost = kinds.lost_presets()
        found = [store.unneeded("DVC's cache here", store.cache_files(repo, now, say), (), whole, old)]
        if files:
            prefix = ("dvc", *store.OBJECTS)
            found += [store.unneeded("the store's objects", files, prefix, whole, old)]
            found += [store.work_in_store(files, lost, old)]
        found += [kinds.work_here(lost, now, old), kinds.results(lost, whole.absent, now, old), kinds.caches(now, old)]
        found += [artifacts.unreferenced(records, now, old, Path(repo.tmp_dir) / "svd-gone.json")]
        yield Plan(found, whole.absent)


def _alone(root: str | None, delete: bool) -> AbstractContextManager[Lease | None]:
    return held_for_cleaning(root) if root and delete else nullcontext()
