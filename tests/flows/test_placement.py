"""What no pipeline could place is said before its first stage: nodes, devices, batches, pools, deployments."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.exceptions import ObjectNotFound

from flows.checking.placement import misplaced, refuse_misplaced
from flows.prefect_flows import dispatch
from flows.stages import PIPELINE
from svd.config import Preset
from svd.config.load import load_preset
from svd.core.errors import UserError

PRESETS = Path(__file__).parents[2] / "presets"


def preset(name: str = "tiny", **compute: Any) -> Preset:
    return load_preset(str(PRESETS / f"{name}.yaml"), {f"compute.{key}": value for key, value in compute.items()})


def test_what_fits_is_let_through() -> None:
    for name in ("tiny", "finetune"):
        assert list(misplaced(preset(name), PIPELINE, gpus=1)) == []


def test_nodes_devices_and_batches_are_named() -> None:
    several = preset(image_to_video={"nodes": 2}, video_pretraining={"devices": 8}, camera_lora={"devices": 3})
    lines = list(misplaced(several, ["image-to-video", "video-pretraining", "camera-lora", "sources"], gpus=4))
    assert "stage 'image-to-video' wants 2 nodes" in lines[0]
    assert lines[1] == "compute: stage 'video-pretraining' wants 8 devices, this machine has 4; set `devices`"
    assert "camera_lora.phases.0: a batch of 16 clips can't be shared by 3 ranks x 1" in lines[2]
    assert len(lines) == 3
    with pytest.raises(UserError, match="2 nodes"):
        refuse_misplaced(several, PIPELINE)
    assert not list(misplaced(preset(video_pretraining={"devices": 8}), PIPELINE))  # nobody knows a cluster's nodes


def test_ranks_that_cant_share_clips_are_named() -> None:
    """Three ranks can't be two and two, an image has one frame, and sixteen clips no thirds."""
    shared = preset(
        image_to_video={"devices": 3, "context_ranks": 2},
        image_pretraining={"devices": 2, "context_ranks": 2},
        camera_lora={"devices": 6, "context_ranks": 2},
        frame_interpolation={"devices": 4, "context_ranks": 2},
    )
    lines = list(misplaced(shared, ["image-to-video", "camera-lora", "frame-interpolation"]))
    assert "image_to_video.phases.0: 3 ranks can't form groups of 2 that share a clip" in lines[0]
    assert "a batch of 16 clips can't be shared by 3 groups of 2 ranks x 1" in lines[-1]
    assert all(line.startswith(("image_to_video", "camera_lora")) for line in lines)
    assert "2 ranks can't share clips whose 'frames' are 1" in next(misplaced(shared, ["image-pretraining"]))


class Server:
    """A Prefect server with one deployment, and the pools that it is given."""

    def __init__(self, *pools: str) -> None:
        self.pools = pools

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read_deployment_by_name(self, name: str) -> Any:
        if name != "orbits/orbits":
            raise ObjectNotFound(Exception(name))
        return SimpleNamespace(work_pool_name="cpu")

    def read_work_pool(self, name: str) -> None:
        if name not in self.pools:
            raise ObjectNotFound(Exception(name))


def test_a_missing_pool_or_deployment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVD_DISPATCH", "deployment")
    monkeypatch.setattr(dispatch, "get_client", lambda sync_client: Server("cpu"))
    dispatch.refuse_unplaceable(preset(), ["orbits"])
    with pytest.raises(UserError, match="no deployment 'latents/latents'"):
        dispatch.refuse_unplaceable(preset(), ["orbits", "latents"])
    monkeypatch.setattr(dispatch, "get_client", lambda sync_client: Server())
    with pytest.raises(UserError, match="no work pool 'cpu', where stage 'orbits' runs"):
        dispatch.refuse_unplaceable(preset(), ["orbits"])


def test_stages_of_this_process_need_this_machines_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVD_DISPATCH", "inline")
    monkeypatch.setattr(dispatch, "gpus_here", lambda: 2)
    dispatch.refuse_unplaceable(preset(image_to_video={"devices": 2}), PIPELINE)
    with pytest.raises(UserError, match="'image-to-video' wants 4 devices, this machine has 2"):
        dispatch.refuse_unplaceable(preset(image_to_video={"devices": 4}), PIPELINE)
