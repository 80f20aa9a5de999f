"""Released checkpoints at full size: every name and shape maps both ways, conversion needs little memory."""

from __future__ import annotations

import ctypes
import gc
import json
import threading
import time
from pathlib import Path

import open_clip
import pytest
import torch

from svd.model.autoencoder import Autoencoder, AutoencoderConfig
from svd.model.formats.clip_names import to_open_clip, to_transformers
from svd.model.formats.convert import convert_model
from svd.model.formats.diffusers_configs import unet_to_json
from svd.model.formats.folders import WEIGHTS, load_unet, save_unet
from svd.model.formats.sgm import (
    SgmParts,
    autoencoder_from_sgm,
    autoencoder_to_sgm,
    diffusers_autoencoder,
    folded_encoder,
    image_autoencoder_config,
    unet_config_of_parts,
    unet_from_sgm,
    unet_to_sgm,
)
from svd.model.safetensors import Lazy, of_module, read_header
from svd.model.unet import UNet, UNetConfig

TABLES = Path(__file__).parent / "state_dict_keys"
LEFTOVERS = {
    "token_embedding.weight": (49408, 1024),
    "positional_embedding": (77, 1024),
    "ln_final.weight": (1024,),
    "ln_final.bias": (1024,),
    "text_projection": (1024, 1024),
    "logit_scale": (),
}


def released(name: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
    def flat(node: dict, path: str) -> dict[str, tuple[int, ...]]:
        found = {}
        for key, value in node.items():
            found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: tuple(value)}
        return found

    return flat(json.loads((TABLES / f"{name}.json").read_text()), prefix)


def lazies(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Lazy]:
    """Tensors of zeros that exist only while they are loaded."""
    return {n: Lazy(s, dtype, lambda s=s: torch.zeros(s, dtype=dtype)) for n, s in shapes.items()}  # type: ignore[misc]


@pytest.fixture(scope="module")
def svd() -> SgmParts:
    """`svd.safetensors` as its specification lists it: names and shapes of all parts."""
    with torch.device("meta"):
        image = of_module(Autoencoder(AutoencoderConfig(temporal_decoder=False)))
        visual = of_module(open_clip.create_model("ViT-H-14", device="meta").visual)
    image_shapes = {n: t.shape for n, t in autoencoder_to_sgm(image, AutoencoderConfig(temporal_decoder=False)).items()}
    clip = {f"visual.{name}": tensor.shape for name, tensor in visual.items()} | LEFTOVERS
    first_stage = released("sgm-vae-encoder", "encoder.") | released("sgm-temporal-decoder", "decoder.")
    return SgmParts(
        unet=lazies(released("sgm-unet-i2v")),
        clip=lazies(clip),
        image_autoencoder=lazies(image_shapes),
        first_stage=lazies(first_stage),
    )


def shapes(tensors: dict[str, Lazy]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def test_the_parts_have_the_published_size(svd: SgmParts) -> None:
    """9.56 GB in float32: the sum that the model card's file size confirms."""
    assert sum(tensor.nbytes for tensor in svd.joined().values()) == 9_559_279_140


def test_every_part_maps_to_diffusers_and_back(svd: SgmParts) -> None:
    config = unet_config_of_parts(svd)
    assert config == UNetConfig(in_channels=8, ids=3)
    ours = unet_from_sgm(svd.unet, config)
    with torch.device("meta"):
        assert shapes(ours) == shapes(of_module(UNet(config)))
    assert shapes(unet_to_sgm(ours, config)) == shapes(svd.unet)
    video, tensors = diffusers_autoencoder(svd)
    assert video == AutoencoderConfig()
    assert shapes(tensors) == released("diffusers-vae")
    back = autoencoder_to_sgm(tensors, video)
    assert shapes(folded_encoder(back)) | {n: s for n, s in shapes(back).items() if n.startswith("decoder.")} == shapes(
        svd.first_stage
    )
    image = image_autoencoder_config(svd)
    assert shapes(autoencoder_to_sgm(autoencoder_from_sgm(svd.image_autoencoder, image), image)) == shapes(
        svd.image_autoencoder
    )
    visual = {n.removeprefix("visual."): t for n, t in svd.clip.items() if n.startswith("visual.")}
    assert shapes(to_open_clip(to_transformers(visual), "folder")) == shapes(visual)


class MemoryWatch:
    """The most anonymous memory (that no file backs) of this process beyond what it had at the start."""

    def __enter__(self) -> MemoryWatch:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what other tests have freed would be used again unseen
        self.start, self.most, self._stop = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.most = max(self.most, self._now() - self.start)

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def test_loading_and_saving_keep_no_second_copy_in_memory(tmp_path: Path) -> None:
    """A U-Net of 69 M parameters: loading takes its size once, saving next to nothing."""
    config = UNetConfig(in_channels=8, ids=3, block_out_channels=(64, 128, 256, 256))
    with torch.device("meta"):
        tensors = of_module(UNet(config))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text(json.dumps(unet_to_json(config)))
    sparse_file(tmp_path / "unet" / WEIGHTS, shapes(tensors))
    size = sum(tensor.nbytes // 2 for tensor in tensors.values())
    with MemoryWatch() as loading:
        unet = load_unet(tmp_path / "unet")
        time.sleep(0.05)  # the watch looks every hundredth of a second
    assert 0.5 * size < loading.most < 1.1 * size
    with MemoryWatch() as saving:
        save_unet(unet, tmp_path / "saved")
    assert saving.most < 0.1 * size


@pytest.mark.slow
def test_a_full_size_file_converts_both_ways_in_bounded_memory(svd: SgmParts, tmp_path: Path) -> None:
    """4.8 GB in float16; the source is a sparse file, so only its header takes space."""
    half = {name: tensor.shape for name, tensor in svd.joined().items()}
    source = sparse_file(tmp_path / "svd.safetensors", half)
    with MemoryWatch() as memory:
        report = convert_model(source, tmp_path / "folder", "diffusers")
        convert_model(tmp_path / "folder", tmp_path / "back.safetensors", "sgm")
    assert report.missing == ()
    assert 0 < memory.most < 500_000_000
    back = {n: tuple(e["shape"]) for n, e in read_header(tmp_path / "back.safetensors").items() if n != "__metadata__"}
    assert back == half


def sparse_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file of float16 zeros that takes no space on disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
    return path
