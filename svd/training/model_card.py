"""The model card of a trained network: `README.md` beside its weights, as the hub and diffusers read it.

YAML front matter (licence, base model, tags, library, task), then what the model is, what it learned from, the options,
the metrics, the parents with hashes and licences, and the limits. Equal results have equal cards: a card is a function
of the preset and of what the stage has read. What only the platform knows (the commit, DVC's hashes) differs between
equal results; `with_provenance` appends it for the copy in MLflow's registry.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from svd.config import Preset
from svd.core.addresses import public_text, public_values
from svd.core.files import write_text
from svd.core.margins import FEWEST, NEEDED, is_shown
from svd.stage import Report, StageContext

CARD = "README.md"
OWN_LICENCE = "apache-2.0"
UNKNOWN = "unknown"
PAPER = "Stable Video Diffusion (arXiv 2311.15127)"
# The hub refuses other names than those of its list; these are the ones of it that published weights often have.
HUB_LICENCES = ("apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "cc-by-4.0", "other", UNKNOWN)


@dataclass(frozen=True)
class Parent:
    """A network that the model needs or started from.

    name: of a stage, of a repository on the hub, or of a file without its folder. digest: SHA-256. hub: the
    repositories on the hub that it comes from.
    """

    role: str
    name: str
    digest: str
    licence: str
    hub: tuple[str, ...] = ()


@dataclass(frozen=True)
class Card:
    """What a stage says of its model. `facts`: of the data, in order; `limits`: one sentence each."""

    stage: str
    tags: tuple[str, ...]
    facts: Mapping[str, Any]
    parents: tuple[Parent, ...]
    limits: tuple[str, ...]
    library: str = "diffusers"
    pipeline: str | None = None


def write_card(folder: Path, card: Card, context: StageContext, report: Report) -> None:
    """Write `README.md` into the folder of a finished model, before it is published."""
    write_text(folder / CARD, render(card, context, report.metrics))


def render(card: Card, context: StageContext, metrics: Mapping[str, float | int | str]) -> str:
    """Return the text of a card; no address in it has a login or a signature, and no path a folder."""
    preset = context.preset
    options = json.dumps(public_values(context.options), sort_keys=True)
    origin = {
        "preset": f"`{preset.name}`",
        "seed": preset.seed,
        "options": ", ".join(f"`{name}`" for name in context.options) or UNKNOWN,
        "SHA-256 of the options": hashlib.sha256(options.encode()).hexdigest() if context.options else UNKNOWN,
    }
    parents = [(p.role, p.name, f"`{p.digest}`", p.licence) for p in card.parents]
    lines = [
        "---",
        yaml.safe_dump(public_values(_front_matter(card, preset)), sort_keys=False, allow_unicode=True) + "---",
        f"\n# {preset.name}/{card.stage}\n",
        context.description or f"Stage `{card.stage}`.",
        f"\nMade by the stage `{card.stage}` of a reimplementation of {PAPER}.",
        *_section("Data", ("", ""), card.facts.items()),
        *_section("Preset", ("", ""), origin.items()),
        *_section("Metrics", ("metric", "value"), metrics.items()),
        *_section("Parents", ("role", "model", "SHA-256", "licence"), parents),
        "\n## Limits\n",
        *(f"- {limit}" for limit in (*card.limits, *_unproven(metrics))),
        "- Which sources it has seen, and under which licences, `svd lineage` tells from MLflow's records.",
    ]
    return public_text("\n".join(lines)) + "\n"


def with_provenance(text: str, facts: Mapping[str, Any]) -> str:
    """Return a card with what the platform knows of this run: the commit, DVC's hashes, the preset's digest."""
    return public_text(text + "\n".join(_section("Provenance", ("", ""), facts.items()))) + "\n"


def front_matter(path: Path) -> dict[str, Any]:
    """Return the front matter of a card; empty when there is no card, or none that can be read."""
    try:
        head, _, rest = path.read_text(encoding="utf-8").partition("---\n")
        values = yaml.safe_load(rest.partition("\n---\n")[0]) if not head else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def licence_of(path: Path) -> str:
    """Return the licence that a card names, "unknown" where none does."""
    values = front_matter(path)
    named = values.get("license_name") if values.get("license") == "other" else values.get("license")
    return str(named or UNKNOWN)


def _unproven(metrics: Mapping[str, Any]) -> list[str]:
    """Say where a network isn't shown to be better than the linear filter."""
    name, clips = "validation_margin_linear", int(metrics.get("validation_clips", 0))
    unsure = [key.removeprefix("validation_loss_linear") for key in metrics if key.startswith("validation_loss_linear")]
    unsure = [suffix for suffix in unsure if not is_shown(metrics.get(name + suffix), clips)]
    return [
        f"On test clips it is not surely better than a linear filter (`{name}{suffix}` is under {NEEDED:g} or not "
        f"known, or there are fewer than {FEWEST} clips)."
        for suffix in unsure
    ]


def _front_matter(card: Card, preset: Preset) -> dict[str, Any]:
    """Return the metadata. `datasets` is left out: the hub takes its entries for repositories, and ours are none."""
    licence = inherited_licence(card.parents)
    listed = licence in HUB_LICENCES
    values: dict[str, Any] = {"license": licence if listed else "other"}
    values |= {} if listed else {"license_name": licence}
    if models := sorted({model for parent in card.parents for model in parent.hub}):
        values["base_model"] = models
    values["library_name"] = card.library
    values |= {"pipeline_tag": card.pipeline} if card.pipeline else {}
    return values | {"tags": [*card.tags, f"preset:{preset.name}"]}


def inherited_licence(parents: Sequence[Parent]) -> str:
    """Return the licence of weights with these parents: ours, unless a parent has another; several are all named."""
    named = {name for parent in parents for name in parent.licence.split(", ")}  # a parent may have inherited several
    others = sorted(named - {OWN_LICENCE})
    return ", ".join(others) or OWN_LICENCE


def _section(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return a heading and a Markdown table; nothing without rows."""
    table = [" | ".join(_cell(value) for value in row) for row in rows]
    if not table:
        return []
    return [f"\n## {title}\n", f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {r} |" for r in table)]


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
