"""`svd config`: show and check presets."""

from __future__ import annotations

import sys

import typer
import yaml

from flows.cli.options import PresetOption, console
from svd.config.load import load_preset

config_app = typer.Typer()


@config_app.command("show")
def show_preset(preset: PresetOption = "tiny") -> None:
    """Print the resolved values of a preset, defaults included."""
    values = load_preset(preset).model_dump(mode="json")
    yaml.safe_dump(values, sys.stdout, sort_keys=False, allow_unicode=True)


@config_app.command("check")
def check_preset(preset: PresetOption = "tiny") -> None:
    """Check a preset: unknown keys, wrong types and ranges are named with their path and the nearest valid name."""
    console.print(f"preset '{load_preset(preset).name}' is valid")
