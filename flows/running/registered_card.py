"""The model card of a registered version: the card beside the weights, and what only the platform knows of the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from flows.stages import Stage
from flows.tracking.runs import Lineage
from svd.config import Preset
from svd.core.addresses import public_values
from svd.training.model_card import CARD, licence_of, with_provenance


def registered_card(
    stage: Stage, preset: Preset, folder: Path, commit: str, inputs: Sequence[Lineage], made: Lineage
) -> dict[str, str]:
    """Return the `card` of what `stage` trained, and a `description` of one line for the version's page.

    folder: its output, with the card that the stage wrote. commit: of the code. inputs, made: DVC hashes.
    """
    values = json.dumps(public_values(preset.model_dump(mode="json")), sort_keys=True)
    facts = {
        "git commit": f"`{commit}`",
        "SHA-256 of the whole preset": f"`{hashlib.sha256(values.encode()).hexdigest()}`",
        **{f"DVC hash of the input `{item.name}`": f"`{item.md5}`" for item in inputs},
        "DVC hash of this output": f"`{made.md5}`",
    }
    path = folder / CARD
    own = path.read_text(encoding="utf-8") if path.is_file() else ""  # outputs of earlier versions have none
    description = (
        f"{stage.description} Preset {preset.name}, seed {preset.seed}, commit {commit}, output {made.md5}, "
        f"licence {licence_of(path)}. Its card is {CARD} among the artifacts of its run."
    )
    return {"card": with_provenance(own, facts), "description": description}
