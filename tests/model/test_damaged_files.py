"""Single files and folders whose metadata, configuration or image tower is damaged: one line, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy_models import VISION_HEADS, released_layout, toy_clip

from svd.core.errors import UserError
from svd.model.formats.clip import image_tower_of, load_image_tower
from svd.model.formats.clip_names import to_transformers, transformers_config
from svd.model.formats.convert import convert_model
from svd.model.formats.sgm import SgmParts, load_sgm, write_sgm
from svd.model.safetensors import Lazy, of_module, of_tensor, write_tensors


def damaged(tensors: dict[str, Lazy], name: str, damage: str) -> dict[str, Lazy]:
    """Without a tensor, or with one of another shape."""
    changed = dict(tensors)
    whole = changed.pop(name)
    shape = (33,) if damage == "line" else tuple(n + 1 for n in whole.shape)
    return changed | ({name: of_tensor(torch.ones(shape))} if damage else {})


def kinds(tensors: dict[str, Lazy]) -> list[str]:
    """The names of one layer and of what stands outside."""
    return sorted(name for name in tensors if ".1." not in name)


VISUAL = {f"visual.{name}": tensor for name, tensor in of_module(toy_clip().visual).items()}
FOLDER = to_transformers(of_module(toy_clip().visual))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("{", "in its metadata is not valid JSON"),
        ("[1]", "in its metadata isn't an object"),
        ('{"frames": "many"}', "frames is 'many', not a positive number"),
        ('{"frames": 0}', "frames is 0, not a positive number"),
        ('{"clip_heads": 2.5}', "clip_heads is 2.5, not a positive number"),
        ('{"unet": {"bogus": 1}}', r"unknown UNetConfig field\(s\) bogus"),
        ('{"unet": [8]}', "expected an object with the fields of UNetConfig"),
        ('{"unet": {"layers_per_block": "two"}}', "layers_per_block: Input should be a valid integer"),
        ('{"unet": {"block_out_channels": [33, 64]}}', "block_out_channels has 2 levels, attention_levels has 4"),
        ('{"unet": {"mixer": "stirred"}}', "mixer: Input should be 'fixed', 'learned'"),
        ('{"unet": 1, "first_stage": 1}', "expected an object with the fields of UNetConfig"),
    ],
)
def test_damaged_metadata_is_one_line(tmp_path: Path, facts: str, message: str) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, released_layout().joined(), {"svd.config": facts})
    for read in (load_sgm, lambda path: convert_model(path, tmp_path / "folder", "diffusers")):
        with pytest.raises(UserError, match=message) as error:
            read(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("damage", ["", "line", "odd"])
@pytest.mark.parametrize("name", kinds(VISUAL))
def test_a_damaged_image_tower_is_one_line(name: str, damage: str) -> None:
    parts = SgmParts(clip=damaged(VISUAL, name, damage), config={"clip_heads": VISION_HEADS})
    with pytest.raises(UserError) as error:
        image_tower_of(parts, "svd.safetensors: image encoder")
    assert str(error.value).startswith("svd.safetensors: image encoder: ") and "\n" not in str(error.value)
    assert damage or name.removeprefix("visual.") in str(error.value)


def test_files_with_a_damaged_image_tower_are_neither_loaded_nor_converted(tmp_path: Path) -> None:
    parts, path = released_layout(), tmp_path / "x.safetensors"
    del parts.clip["visual.conv1.weight"]
    write_sgm(path, parts)
    for read in (load_image_tower, lambda path: convert_model(path, tmp_path / "folder", "diffusers")):
        with pytest.raises(UserError, match=r"x\.safetensors: image encoder: tensor 'conv1\.weight' is missing"):
            read(path)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("damage", ["", "line", "odd"])
@pytest.mark.parametrize("name", kinds(FOLDER))
def test_a_damaged_image_encoders_folder_is_one_line(tmp_path: Path, name: str, damage: str) -> None:
    write_tensors(tmp_path / "model.safetensors", damaged(FOLDER, name, damage))
    config = transformers_config(of_module(toy_clip().visual), VISION_HEADS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        load_image_tower(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_odd_keys_of_an_image_encoders_config_are_one_line(tmp_path: Path) -> None:
    config = transformers_config(of_module(toy_clip().visual), VISION_HEADS)
    write_tensors(tmp_path / "model.safetensors", FOLDER)
    for key in ("hidden_size", "patch_size", "projection_dim", "num_attention_heads", "hidden_act"):
        for value in (None, "odd", 0, 2.5):
            (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
            with pytest.raises(UserError, match=rf"config\.json: {key}") as error:
                load_image_tower(tmp_path)
            assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_a_tower_whose_heads_are_impossible_is_one_line(tmp_path: Path) -> None:
    parts = released_layout()
    for heads, message in ((5, "a width of 32 can't have 5 heads"), (None, "a width of 32 is none of open_clip's")):
        parts.config.pop("clip_heads", None)
        parts.config |= {"clip_heads": heads} if heads else {}
        write_sgm(tmp_path / "x.safetensors", parts)
        with pytest.raises(UserError, match=f"x.safetensors: image encoder: .*{message}"):
            load_image_tower(tmp_path / "x.safetensors")
