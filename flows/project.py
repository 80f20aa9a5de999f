"""The project in the working folder: which preset its params.yaml selects, and the preset that a pipeline runs with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flows.stages import STAGES
from svd.config import Preset
from svd.config.load import load_preset
from svd.core.errors import UserError

PARAMS = Path("params.yaml")


def current_preset() -> str:
    """Return the name of the preset that `params.yaml` selects; raises UserError outside the project's folder."""
    try:
        return str(yaml.safe_load(PARAMS.read_text())["preset"])
    except (FileNotFoundError, TypeError, KeyError, yaml.YAMLError):
        message = f"{PARAMS.absolute()}: expected a line `preset: NAME`; run the command in the project's folder"
        raise UserError(message) from None


def pipeline_preset(name: str | None) -> Preset:
    """Return the preset of a pipeline: `name`, else the one in params.yaml, which is left as it is.

    Raises UserError for a preset whose file isn't presets/NAME.yaml, or which leaves open an option that a stage lists:
    DVC looks for these options in that file.
    """
    preset = load_preset(name or current_preset())
    if not Path(f"presets/{preset.name}.yaml").exists():
        raise UserError(f"the pipeline's presets live in presets/; there is no presets/{preset.name}.yaml")
    if missing := unwritten_options(preset):
        names = ", ".join(f"'{name}'" for name in missing)
        message = f"leaves {names} to the default, but DVC watches it there; write it out"
        raise UserError(f"presets/{preset.name}.yaml {message}")
    return preset


def option(values: Mapping[str, Any], dotted: str) -> Any:
    """Return the value at a dotted path of nested mappings; None where there is none."""
    found: Any = values
    for name in dotted.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def unwritten_options(preset: Preset) -> list[str]:
    """Return the options, by dotted path, that stages list (flows/stages.py) and the preset's file doesn't set."""
    given = preset.model_dump(mode="json", exclude_unset=True)
    listed = {dotted for stage in STAGES.values() for dotted in stage.options}
    return sorted(dotted for dotted in listed if option(given, dotted) is None)
