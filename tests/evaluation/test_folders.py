"""Folders of clips under several protocols: chosen by name, kept by content, refused when they can't be scored."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from evaluation.frechet import folders
from evaluation.frechet.folders import choose, protocols, score_folders
from svd.core.errors import UserError
from svd.media.video import write_mp4
from svd.synthetic.scenes import World, render_clip


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("clips")
    world, rng = World(0, "test"), np.random.default_rng(0)
    for number in range(8):
        frames = render_clip(world, number, 5, 48, 64, 8).frames
        write_mp4(root / "real" / f"class{number % 2}" / f"{number}.mp4", frames, 8)
        other = render_clip(world, 100 + number, 5, 48, 64, 8).frames
        write_mp4(
            root / "made" / f"{number}.mp4", np.clip(other + rng.normal(0, 9, other.shape), 0, 255).astype(np.uint8), 8
        )
    return root / "real", root / "made"


def test_protocols_disagree_about_the_same_clips(clips: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    wanted = protocols(["tf_original", "junyaohu_crop"], transnetv2=True, frames=4, samples=6)
    rows = score_folders(*clips, wanted, tmp_path)
    changed = "[net=transnetv2,frames=4,real=6,generated=6]"
    assert [row.protocol.split()[0] for row in rows] == [f"tf_original{changed}", f"junyaohu_crop{changed}"]
    assert all(row.metric == "frechet_transnetv2" and row.real == row.generated == 6 for row in rows)
    assert abs(rows[0].value / rows[1].value - 1) > 0.01
    monkeypatch.setattr(folders, "_images", lambda *a: pytest.fail("features were not kept"))
    assert score_folders(*clips, wanted, tmp_path) == rows


def test_a_renamed_clip_is_read_anew(clips: tuple[Path, Path], tmp_path: Path) -> None:
    """Names choose the frames of real clips, so features are kept by name as well as by content."""
    real = shutil.copytree(clips[0], tmp_path / "real")
    wanted = protocols(["tf_original"], transnetv2=True, frames=2)
    first = score_folders(real, clips[1], wanted, tmp_path / "work")[0]
    for path in sorted((real / "class1").iterdir()):
        path.rename(path.with_name(f"renamed {path.name}"))
    second = score_folders(real, clips[1], wanted, tmp_path / "work")[0]
    assert second.value != first.value and second.protocol == first.protocol
    assert second == score_folders(real, clips[1], wanted, tmp_path / "other work")[0]


def test_the_number_of_clips_is_part_of_what_was_measured(clips: tuple[Path, Path], tmp_path: Path) -> None:
    wanted = protocols(["tf_original"], transnetv2=True, frames=4)
    few = shutil.copytree(clips[1], tmp_path / "few")
    (few / "0.mp4").unlink()
    digests = {score_folders(clips[0], made, wanted, tmp_path)[0].protocol for made in (clips[1], few)}
    assert len(digests) == 2


def test_a_subset_is_spread_over_the_folder_and_does_not_grow_by_repetition(clips: tuple[Path, Path]) -> None:
    chosen = choose(clips[0], 4)
    assert chosen == choose(clips[0], 8)[:4] and chosen != sorted(chosen)
    with pytest.raises(UserError, match="8 clips, the protocol needs 9"):
        choose(clips[0], 9)
    with pytest.raises(UserError, match="no such folder"):
        choose(clips[0] / "absent", None)


def test_mistakes(clips: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="known: svd_ucf101_paper"):
        protocols(["fvd"])
    with pytest.raises(UserError, match="needs 16"):
        score_folders(*clips, protocols(["tf_original"], transnetv2=True, samples=6), tmp_path)
    same = protocols(["tf_original"], transnetv2=True, frames=5)
    with pytest.raises(UserError, match="8 of 8 generated clips are identical"):
        score_folders(clips[0], clips[0].parent / "real" / ".", same, tmp_path / "b")
