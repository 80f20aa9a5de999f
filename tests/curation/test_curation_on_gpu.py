"""The networks of curation on a GPU give what they give on the CPU, in the processes and behind the limits of a run."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from curation_inputs import tiny, write_encoders
from measured_units import write_unit
from media_files import Kind, shots, tiny_config, write
from safetensors.torch import load_file
from torch import nn
from torchvision.models.optical_flow import raft_large

from svd.curation.base.types import ClipAnalysis
from svd.curation.measuring.child import limited_resource
from svd.curation.measuring.process import DecodeProcess
from svd.curation.scoring.unit import ClipScorer
from svd.curation.text import craft
from svd.curation.text.base import MEAN, MULTIPLE, STD
from svd.model.formats.encoders import load_encoders

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture
def frames() -> list[np.ndarray]:
    return list(shots([26], height=180, width=320, speed=0.5))


@pytest.fixture
def raft_weights(tmp_path: Path) -> str:
    torch.manual_seed(0)
    torch.save(raft_large().state_dict(), tmp_path / "raft.pth")
    return str(tmp_path / "raft.pth")


@pytest.fixture
def craft_weights(frames: list[np.ndarray], tmp_path: Path) -> str:
    """Random weights that take some of the frames for text: their maps are shifted so that parts cross the thresholds.

    He's initialisation keeps the maps large against the rounding of a GPU's convolutions.
    """
    torch.manual_seed(0)
    model = craft.Craft().eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    picture = np.pad(frames[0], ((0, -len(frames[0]) % MULTIPLE), (0, 0), (0, 0)))
    pixels = torch.from_numpy((picture / np.float32(255) - MEAN) / STD).permute(2, 0, 1)[None]
    with torch.no_grad():
        last, maps = model.conv_cls[-1], model(pixels)[0].flatten(0, 1)
        factor = 0.3 / maps.std(0)
        last.weight.mul_(factor[:, None, None, None])
        last.bias.sub_(maps.mean(0)).mul_(factor)
    torch.save(model.state_dict(), tmp_path / "craft.pth")
    return str(tmp_path / "craft.pth")


def analyse(video: Path, raft_weights: str, craft_weights: str, device: str) -> ClipAnalysis:
    """The one clip of a source, analysed on `device` by a process whose memory is limited."""
    config = tiny_config(
        motion__algorithm="raft",
        motion__raft_weights=raft_weights,
        motion__fps=1.0,
        text__detector="craft",
        text__craft_weights=craft_weights,
        text__craft_long_side=320,
    )
    with DecodeProcess() as decoding:
        (clip,) = decoding.analyse(video, config).clips
        assert decoding._process is not None and decoding._process.pid is not None
        limit, _ = resource.prlimit(decoding._process.pid, limited_resource(device)[0])
        assert limit != resource.RLIM_INFINITY, f"the process doesn't run on {device}, or without a limit"
    return clip


def test_a_decoding_process_on_a_gpu_gives_flow_and_text_of_the_cpu(
    frames: list[np.ndarray], raft_weights: str, craft_weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = write(tmp_path / "v", frames, kind=Kind(options={"preset": "ultrafast"}))
    found = analyse(video, raft_weights, craft_weights, DEVICE)
    with monkeypatch.context() as patched:
        patched.setenv("CUDA_VISIBLE_DEVICES", "")
        expected = analyse(video, raft_weights, craft_weights, "cpu")
    assert found.span == expected.span and found.flow.shape == expected.flow.shape == (1, 16, 28, 2)
    flow, reference = found.flow.astype(np.float64), expected.flow.astype(np.float64)
    assert np.linalg.norm(flow - reference) < 0.02 * np.linalg.norm(reference)
    assert found.motion_score == pytest.approx(expected.motion_score, rel=0.02)
    assert all(0.01 < area < 0.9 for area in expected.text_areas), "it must find something, not everything"
    assert found.text_areas == pytest.approx(expected.text_areas, abs=0.02)


def test_scoring_on_a_gpu_gives_the_embeddings_and_similarities_of_the_cpu(tmp_path: Path) -> None:
    config, encoders = tiny().encoders, write_encoders(tmp_path / "encoders")
    vectors, similarities = {}, {}
    for device in ("cpu", DEVICE):
        unit = write_unit(tmp_path / device, clips=40, height=180, width=320)
        scorer = ClipScorer(load_encoders(encoders, config, device), [], ("sidecar", "motion"), device=device)
        scored = scorer.score_unit(unit, tmp_path / device / "scored", 1 << 20)
        vectors[device] = load_file(scored / "embeddings.safetensors")
        similarities[device] = pl.read_parquet(scored / "scores.parquet")["similarity"].to_numpy()
    assert vectors["cpu"].keys() == vectors[DEVICE].keys() and len(vectors["cpu"]) == 40
    for name, expected in vectors["cpu"].items():
        assert torch.allclose(vectors[DEVICE][name].float(), expected.float(), atol=5e-3)
        assert torch.allclose(expected.float().norm(dim=-1), torch.ones(3), atol=1e-2)
    assert np.allclose(similarities[DEVICE], similarities["cpu"], atol=5e-3)
