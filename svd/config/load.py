"""Reading of presets: one YAML file is one `Preset`. A mistake is named by file, key path and nearest valid name."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from svd.config.compute import MOVED
from svd.config.preset import Preset
from svd.core.errors import UserError

PRESETS = Path("presets")  # of the working folder, which may be another checkout than that of the code


class ConfigError(UserError):
    """A preset that can't be used; the message has one line per mistake."""


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    """Return the pydantic model inside an annotation such as `X | None` or `list[X]`, if there is one."""
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        return annotation
    return next((m for a in typing.get_args(annotation) if (m := _nested_model(a))), None)


def _valid_names(location: tuple[int | str, ...]) -> list[str]:
    """Return the names that are valid beside the last element of `location`."""
    model: type[BaseModel] | None = Preset
    for part in location[:-1]:
        if model is None:
            return []
        if isinstance(part, str) and part in model.model_fields:
            model = _nested_model(model.model_fields[part].annotation)
    return list(model.model_fields) if model else []


def _explain(error: Any, source: str) -> str:
    """Return one line about a mistake that pydantic found."""
    location = ".".join(str(part) for part in error["loc"])
    if location in MOVED:
        return f"{source}: {MOVED[location]}"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), _valid_names(error["loc"]), n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else f"; valid: {', '.join(_valid_names(error['loc']))}"
        return f"{source}: unknown key '{location}'{hint}"
    if error["type"] == "missing":
        return f"{source}: '{location}' is missing"
    if error["loc"][-1:] == ("[key]",):  # of a mapping whose keys are names, such as captioners
        return f"{source}: unknown key '{location.removesuffix('.[key]')}': {error['msg']}"
    place = f"'{location}': " if location else ""  # a rule between sections names them itself
    found = "" if isinstance(error["input"], Mapping) else f" (got {error['input']!r})"
    return f"{source}: {place}{error['msg'].removeprefix('Value error, ')}{found}"


def _lines(errors: Sequence[Any], source: str) -> list[str]:
    """Return one line per mistake; the same one in several sections, as YAML's aliases repeat it, is told once."""
    lines: dict[str, str] = {}
    others: dict[str, list[str]] = {}
    for error in errors:
        line, section = _explain(error, source), str(error["loc"][0]) if len(error["loc"]) > 1 else ""
        same = line.replace(section, "*") if section else line
        if same in lines:
            others[same].append(section)
        else:
            lines[same], others[same] = line, []
    return [line + (f"; the same in {', '.join(others[same])}" if others[same] else "") for same, line in lines.items()]


def parse_preset(values: dict[str, Any], source: str) -> Preset:
    """Validate the values of a preset.

    Raises ConfigError with one line per mistake, which names `source` and the path of the key.
    """
    try:
        return Preset.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error.errors(), source))) from None


def load_preset(name_or_path: str, overrides: dict[str, Any] | None = None) -> Preset:
    """Load `presets/<name>.yaml` or a YAML file; `overrides` maps dotted paths to values.

    >>> load_preset("tiny", {"compute.training.devices": 2}).compute.image_to_video.devices
    2

    Raises ConfigError for a missing file, broken YAML, unknown or out-of-range keys, and for a file in presets/ whose
    `name` isn't its file's: it would run under the name, and into the outputs, of another preset.
    """
    path = preset_path(name_or_path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    if path.resolve().parent == PRESETS.resolve() and values.get("name", path.stem) != path.stem:
        raise ConfigError(
            f"{path}: 'name' is '{values['name']}', but presets/ is searched by file name; write `name: {path.stem}`"
        )
    for dotted, value in (overrides or {}).items():
        _assign(values, dotted.split("."), value)
    return parse_preset(values, str(path))


def preset_path(name_or_path: str) -> Path:
    """Return the file of a preset; raises ConfigError that lists the presets of the working folder if there is none."""
    for candidate in (Path(name_or_path), PRESETS / f"{name_or_path}.yaml"):
        if candidate.is_file():
            return candidate
    if not PRESETS.is_dir():
        raise ConfigError(f"no {PRESETS}/ in {Path.cwd()}; run the command in the project's folder")
    known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
    raise ConfigError(f"no preset '{name_or_path}': give a YAML file or one of: {known}")


def _assign(values: dict[str, Any], parts: list[str], value: Any) -> None:
    """Set a value inside nested mappings, making those that aren't there.

    Those on the way are copied, because through a YAML alias the same mapping may stand at other places, too.
    """
    for part in parts[:-1]:
        found = values.get(part)
        values[part] = values = dict(found) if isinstance(found, Mapping) else {}
    values[parts[-1]] = value
