"""The stage `orbits`: format, seeds, determinism, resuming, mesh files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import trimesh
from safetensors.numpy import load_file

from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.orbits import stage as orbits
from svd.orbits.stage import key, objects, render_training_orbit
from svd.stage import StageContext

BASE = {"objects": 3, "views": 9, "size": 64}


def context(folder: Path, **overrides: Any) -> StageContext:
    preset = load_preset("tiny", {f"orbits.{name}": value for name, value in {**BASE, **overrides}.items()})
    return StageContext(preset, {}, folder / "out", folder / "work")


def read(folder: Path) -> dict[str, np.ndarray]:
    shards = [load_file(path) for path in sorted((folder / "out").glob("orbits-*.safetensors"))]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orbits")
    orbits.run(context(folder))
    return folder


def test_format(rendered: Path) -> None:
    data, index = read(rendered), json.loads((rendered / "out/index.json").read_text())
    assert data["frames"].shape == (3, 9, 64, 64, 3) and data["frames"].dtype == np.uint8
    assert data["azimuth"].shape == (3, 9) and (data["azimuth"][:, -1] == 0).all()
    assert ((data["elevation"] >= -5) & (data["elevation"] <= 30)).all() and len(set(data["elevation"])) == 3
    assert [name for shard in index["shards"] for name in shard["objects"]] == [
        f"procedural-plain-0-0-{number}-0" for number in range(3)
    ]
    assert (data["frames"][:, :, 0] == 255).all()  # white above every object
    for number in range(3):
        assert len({view.tobytes() for view in data["frames"][number]}) == 9


def test_equal_bytes_and_resuming_with_several_shards(rendered: Path, tmp_path: Path, monkeypatch: Any) -> None:
    orbits.run(context(tmp_path / "again"))
    for path in sorted((rendered / "out").iterdir()):
        assert path.read_bytes() == (tmp_path / "again/out" / path.name).read_bytes()
    monkeypatch.setattr(orbits, "_SHARD_BYTES", 2 * 9 * 64 * 64 * 3)
    done: list[int] = []

    def dies(mesh: Any, number: int, *rest: Any) -> Any:
        if number == 2 and 2 not in done:
            done.append(2)
            raise KeyboardInterrupt
        done.append(number)
        return render_training_orbit(mesh, number, *rest)

    monkeypatch.setattr(orbits, "render_training_orbit", dies)
    with pytest.raises(KeyboardInterrupt):
        orbits.run(context(tmp_path / "killed"))
    orbits.run(context(tmp_path / "killed"))
    assert done == [0, 1, 2, 2]
    killed, whole = read(tmp_path / "killed"), read(rendered)
    assert len(list((tmp_path / "killed/out").glob("*.safetensors"))) == 2
    assert all(np.array_equal(killed[name], whole[name]) for name in whole)


def test_mesh_files_and_environments(tmp_path: Path) -> None:
    for name, extents in (("tall", (0.3, 1, 0.3)), ("flat", (1, 0.2, 0.4))):
        trimesh.creation.box(extents=extents).export(tmp_path / f"{name}.glb")
    bright = np.full((16, 32, 3), 0.2, np.float32)
    bright[:4] = 5
    cv2.imwrite(str(tmp_path / "sky.hdr"), bright)
    orbits.run(context(tmp_path, meshes=[str(tmp_path)], environments=[str(tmp_path)]))
    covered = (read(tmp_path)["frames"].min(-1) < 250).any(3).sum((1, 2))
    shards = json.loads((tmp_path / "out" / "index.json").read_text())["shards"]
    height = dict(zip([name for shard in shards for name in shard["objects"]], covered, strict=True))
    assert set(height) == {"tall", "flat"} and height["tall"] > 1.5 * height["flat"]


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        orbits.run(context(tmp_path, meshes=["/nowhere"]))
    with pytest.raises(UserError, match=r"no \.hdr file"):
        orbits.run(context(tmp_path, environments=[str(tmp_path)]))


def test_train_and_test_objects_share_no_seed() -> None:
    train = {key(0, "train", n, p) for n in range(500) for p in ("mesh", "camera", "light")}
    test = {key(0, "test", n, p) for n in range(500) for p in ("mesh", "camera", "light")}
    assert not train & test and len(train) == 1500
    assert objects([], 3) == [None, None, None]


def test_some_of_many_meshes_are_no_alphabetical_choice(tmp_path: Path) -> None:
    for number in range(40):
        path = tmp_path / "gso" / f"{number:02d}_object" / "meshes" / "model.obj"
        path.parent.mkdir(parents=True)
        path.touch()
    chosen = objects([str(tmp_path / "gso")], 10)
    names = [path.parts[-3] for path in chosen if path]
    assert len(set(names)) == 10 and max(names) > "20" and names != sorted(names)
    assert objects([str(tmp_path / "gso")], 5) == chosen[:5], "fewer objects are the first of more"
    moved = (tmp_path / "gso").rename(tmp_path / "elsewhere")
    assert [path.parts[-3] for path in objects([str(moved)], 10) if path] == names, "the place plays no role"
