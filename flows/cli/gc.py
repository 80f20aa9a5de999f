"""`svd gc`: what can go, and its removal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from flows.cli.options import console, table_console

if TYPE_CHECKING:
    from flows.cleaning.kinds import Thing


def collect_garbage(days: float, store: str | None, delete: bool, verbose: bool) -> None:
    """Print by kind what stays and what goes; remove the latter when `delete` is set."""
    from flows.cleaning.collect import planned
    from flows.recording.results_store import store_root

    with planned(days, store_root(store), delete, console.print) as plan:
        out, freed = table_console(), 0
        table = Table("kind", "kept", "bytes kept", "removed" if delete else "to be removed", "bytes freed")
        for kind in plan.kinds:
            doomed = sum(thing.size or 0 for thing in kind.doomed)
            table.add_row(kind.title, str(len(kind.kept)), _bytes(kind.kept), str(len(kind.doomed)), f"{doomed:,}")
            freed += doomed
        out.print(table)
        for kind in plan.kinds:
            for thing in kind.doomed if verbose else ():
                out.print(f"{kind.title}: {thing.name} ({thing.size or 0:,} bytes)", highlight=False)
        if plan.absent:
            out.print(f"{len(plan.absent)} folders that are needed are neither here nor in a remote; see `dvc push`")
        if delete:
            plan.delete()
        out.print(f"{freed:,} bytes {'freed' if delete else 'can be freed: --delete'}", highlight=False)


def _bytes(things: Sequence[Thing]) -> str:
    sizes = [thing.size for thing in things]
    return "not measured" if None in sizes else f"{sum(filter(None, sizes)):,}"
