"""The dry run: what it counts, probes, estimates and says."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from curation_inputs import tiny, write_video
from web_server import serving

from svd import storage
from svd.config import EncodersConfig
from svd.curation import dry_run as planning
from svd.curation.dry_run import plan_curation
from svd.sources.listing import list_sources
from svd.sources.source import Source

TOY = EncodersConfig(kind="toy-clip")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 1, 2 and 3 seconds, and a tar with them."""
    folder = tmp_path_factory.mktemp("videos")
    with tarfile.open(folder / "w.tar", "w") as tar:
        for seconds in (1, 2, 3):
            write_video(folder / f"{seconds}.mp4", frames=24 * seconds)
            tar.add(folder / f"{seconds}.mp4", f"{seconds}.mp4")
    return folder


def test_members_of_tars_are_probed_where_they_lie(videos: Path) -> None:
    local = plan_curation(list_sources([str(videos / "w.tar")]), tiny().curation, 2, TOY)
    assert (local.sources, local.unknown, local.units) == (3, 0, 2)
    assert local.hours == pytest.approx(6 / 3600, rel=0.02) and local.download_gigabytes == 0
    with serving(videos) as (address, _):
        remote = plan_curation(list_sources([f"{address}/w.tar"]), tiny().curation, 2, TOY)
    assert (remote.hours, remote.cpu_hours, remote.unknown) == (local.hours, local.cpu_hours, 0)
    assert remote.download_gigabytes == pytest.approx(sum(p.stat().st_size for p in videos.glob("*.mp4")) / 1e9)


def test_a_part_of_a_prefix_is_probed_and_the_rest_estimated(
    videos: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        storage.upload(videos / "2.mp4", f"{bucket}/raw/{number}.mp4")
    monkeypatch.setattr(planning, "REMOTE_PROBES", 2)
    sources = list_sources([f"{bucket}/raw"])
    found = plan_curation(sources, tiny().curation, 64, TOY)
    assert (found.sources, found.unknown, found.estimated) == (6, 4, 4)
    assert (found.hours, found.estimated_hours) == pytest.approx((4 / 3600, 8 / 3600), rel=0.02)
    assert found.download_gigabytes == pytest.approx(6 * (videos / "2.mp4").stat().st_size / 1e9)
    assert "6 (2 probed, 4 estimated from those)" in found.lines()[0] and "estimated by bytes" in found.lines()[2]


def test_a_list_of_other_files_is_no_video(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(videos)
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {videos / '2.mp4'}\n")
    (tmp_path / "near.mp4").write_text("ffconcat version 1.0\nfile 2.mp4\n")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "lists.tar", "w") as tar:
        tar.add(tmp_path / "near.mp4", "near.mp4")
    for place in (tmp_path / "list.mp4", tmp_path / "near.mp4", tmp_path / "tars"):
        found = plan_curation(list_sources([str(place)]), tiny().curation, 64, TOY)
        assert (found.sources, found.unknown, found.clips) == (1, 1, 0)


def test_sizes_weigh_an_estimate(videos: Path) -> None:
    (known,) = list_sources([str(videos / "2.mp4")])
    size = (videos / "2.mp4").stat().st_size
    found = plan_curation([known, Source("ytdl:x"), Source("ytdl:y", size=10 * size)], tiny().curation, 64, TOY)
    assert found.estimated_hours == pytest.approx((2 + 20) / 3600, rel=0.02)


def test_nothing_known_is_said(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_text("nothing")
    found = plan_curation([*list_sources([str(tmp_path)]), Source("ytdl:x")], tiny().curation, 64, TOY)
    assert (found.unknown, found.estimated, found.cpu_hours) == (2, 1, 0)
    assert any("not known" in line for line in found.lines()) and not any("CPU" in line for line in found.lines())


def test_small_inputs_have_no_zeros_and_networks_have_their_cost(videos: Path) -> None:
    config = tiny(curation__captions__captioners=["coca", "llm", "motion"]).curation
    sources = list_sources([str(videos)])
    found = plan_curation(sources, config, 64, EncodersConfig(model="ViT-L-14"))
    text = "\n".join(found.lines())
    assert "0.000" not in text and "0.00 " not in text and " kB" in text
    assert "CLIP ViT-L-14: about" in text and "CoCa coca_ViT-L-14: up to" in text
    assert "llm captioner: cost not measured" in text
    frames = found.clips * planning.FRAMES_PER_CLIP
    assert found.wall_hours == pytest.approx(frames * planning.EMBEDDING_SECONDS["ViT-L-14"] / 3600)
    assert plan_curation(sources, config, 64, TOY).wall_hours < found.wall_hours
