"""`svd lineage`: where a model comes from, and what a source went into."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.table import Table

from flows.cli.options import table_console

if TYPE_CHECKING:
    from flows.lineage.forward import Origin
    from flows.lineage.takedown import Takedown

RELATIONS = {
    "trained": "trained on it",
    "perhaps": "may have seen it",
    "validated": "validated with it",
    "unknown": "may have seen it: what it read is nowhere to be had",
}


def print_origin(name: str, shown: int | None, as_json: bool, store: str | None) -> None:
    """Print where the model, run or output `name` comes from; shown: number of sources (None: all)."""
    from flows.lineage.forward import trace
    from flows.lineage.objects import open_objects
    from flows.lineage.records import Records

    with open_objects(store) as objects:
        origin = trace(name, Records(), objects)
    _print_json(origin.as_json()) if as_json else _print_origin(origin, shown)


def print_takedown(source: str, shown: int | None, as_json: bool, store: str | None) -> None:
    """Print what `source` went into; shown: number of clips per catalogue (None: all)."""
    from flows.lineage.objects import open_objects
    from flows.lineage.records import Records
    from flows.lineage.takedown import report_source

    with open_objects(store) as objects:
        found = report_source(source, Records(), objects)
    _print_json(found.as_json()) if as_json else _print_takedown(found, shown)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print_origin(origin: Origin, shown: int | None) -> None:
    out, run, model = table_console(), origin.run, origin.model
    facts = _table("", "what", "value")
    if model is not None:
        facts.add_row(
            "model", f"{model.name} version {model.version} {' '.join('@' + a for a in model.aliases)}".strip()
        )
    facts.add_row("MLflow run", f"{run.id} ({run.stage}, {run.status})")
    facts.add_row("pipeline's run", run.pipeline or "none: the stage was run alone")
    facts.add_row("git commit", run.commit)
    facts.add_row("preset", run.preset)
    for stage, md5 in run.outputs.items():
        facts.add_row(f"output {stage}", md5)
    out.print(facts)
    data = _table("made from", "data", "DVC hash", "MLflow run", "git commit")
    for item in origin.data:
        made = (item.run.id, item.run.commit) if item.run else ("MLflow knows of none", "")
        data.add_row(item.stage, item.md5, *made)
    out.print(data)
    for use in origin.catalogues:
        _print_catalogue(out, use, shown)


def _print_catalogue(out: Any, use: Any, shown: int | None) -> None:
    out.print(f"\ncatalogue {use.md5}", highlight=False)
    if use.problem:
        out.print(f"  not all could be read: {use.problem}", highlight=False)
    count = f"{use.trained} trained on, {use.perhaps} perhaps, {use.validated} for validation"
    out.print(f"  {use.clips} clips, {use.kept} kept; {count}; from {len(use.sources)} sources", highlight=False)
    sources = _table("", "source", "trained", "perhaps", "validation", "licence")
    for uri, *counts, licence in use.sources[:shown]:
        sources.add_row(uri, *map(str, counts), licence)
    if use.sources:
        out.print(sources)
    if shown is not None and len(use.sources) > shown:
        out.print(f"  {len(use.sources) - shown} more sources: --all")


def _print_takedown(found: Takedown, shown: int | None) -> None:
    out = table_console()
    for one in found.found:
        out.print(f"catalogue {one.catalogue}: {len(one.clips)} clips, {len(one.kept)} kept", highlight=False)
        for uri in one.uris[:shown]:
            out.print(f"  source {uri}", highlight=False)
        for clip in one.clips[:shown]:
            out.print(f"  clip {clip} ({'kept' if clip in one.kept else 'filtered out'})", highlight=False)
        if shown is not None and len(one.clips) > shown:
            out.print(f"  {len(one.clips) - shown} more clips: --all")
    if not found.found:
        out.print(f"no catalogue that can be read has {found.source}", highlight=False)
    for md5 in found.unreadable:
        out.print(f"catalogue {md5} could not be read, it may have the source", highlight=False)
    data = _table("data that holds it", "data", "DVC hash", "clips")
    for holder in found.data:
        data.add_row(holder.stage, holder.md5, "" if holder.clips is None else str(holder.clips))
    out.print(data)
    for title, readers in (("runs", found.runs), ("registered models", found.models)):
        table = _table(title, "name", "MLflow run", "use", "clips trained", "perhaps", "validation", "through")
        for reader in readers:
            counts = map(str, (reader.trained, reader.perhaps, reader.validated))
            table.add_row(reader.name, reader.run_id, RELATIONS[reader.relation], *counts, "\n".join(reader.through))
        out.print(table)
