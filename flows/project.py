"""The project in the working folder: which preset its params.yaml selects, and the preset that a pipeline runs with."""

from __future__ import annotations

from pathlib import Path

import yaml

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

    Raises UserError for a preset whose file isn't presets/NAME.yaml: DVC looks for its options there.
    """
    preset = load_preset(name or current_preset())
    if not Path(f"presets/{preset.name}.yaml").exists():
        raise UserError(f"the pipeline's presets live in presets/; there is no presets/{preset.name}.yaml")
    return preset
