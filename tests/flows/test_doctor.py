"""`svd doctor`: what is missing is named, with what to do, and makes the command fail."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from project_folder import give_presets
from typer.testing import CliRunner

from flows.cli import doctor
from flows.cli.app import app
from svd.config.load import load_preset

WEIGHTS = {
    "encoders.aesthetics_weights": "weights/sa_0_4_vit_h_14_linear.pth",
    "curation.text.craft_weights": "weights/craft_mlt_25k.pth",
    "evaluation.ucf101.weights": "weights/i3d_torchscript.pt",
    "evaluation.multiview.lpips_weights": "weights/lpips_vgg.safetensors",
    "autoencoder.perceptual_weights.0": "weights/vgg16-397923af.pth",
    "autoencoder.perceptual_weights.1": "weights/lpips_vgg_v0.1.pth",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without weights; the slow look at the renderer is left out."""
    monkeypatch.chdir(give_presets(tmp_path))
    monkeypatch.setattr(doctor, "_egl", lambda: doctor.Finding("EGL", "ok", "left out"))
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def findings(preset: str) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.run_checks(load_preset(preset))}


def test_missing_weights_are_named_and_found_ones_are_not(tmp_path: Path) -> None:
    found = findings("paper")
    for option, file in WEIGHTS.items():
        assert found[option].state == "fail" and found[option].found == f"{file}: no such file"
        assert option in found[option].advice
    assert found["model.pretrained"].state == "note" and "svd fetch" in found["model.pretrained"].advice
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "craft_mlt_25k.pth").touch()
    assert findings("paper")["curation.text.craft_weights"].state == "ok"


def test_whatever_fails_says_what_to_do_and_the_command_fails() -> None:
    for finding in findings("paper").values():
        assert finding.advice or finding.state == "ok", finding
    result = CliRunner().invoke(app, ["doctor", "-p", "paper"])
    assert result.exit_code == 1
    assert all(file in result.output for file in WEIGHTS.values()), "a piped table cuts no name"


def test_a_configured_service_must_answer(listening: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{listening}")
    assert findings("tiny")["MLFLOW_TRACKING_URI"].state == "ok"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    found = findings("tiny")["MLFLOW_TRACKING_URI"]
    assert found.state == "fail" and "make up" in found.advice and "unset MLFLOW_TRACKING_URI" in found.advice
    assert findings("tiny")["PREFECT_API_URL"].state == "note"


@pytest.mark.parametrize("address", ["http://user:SECRET@127.0.0.1:9", "postgresql://user:SECRET@127.0.0.1:9/mlflow"])
def test_an_address_is_shown_without_its_password(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    found = findings("tiny")["MLFLOW_TRACKING_URI"]
    assert "://127.0.0.1:9" in found.found and "SECRET" not in f"{found}"
