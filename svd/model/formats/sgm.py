"""Stability's single files (sgm): one safetensors with every network under its own prefix.

Layout of `svd.safetensors` and `svd_xt.safetensors`: U-Net, CLIP image tower (with leftovers of the text tower), the
autoencoder that encodes the conditioning frame (an SD image autoencoder with its quant convolutions), and the first
stage (encoder without quant convolution, temporal decoder). In the image-decoder variants the first stage is a whole
image autoencoder; SD 2.1 has a text tower in place of the conditioner.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from svd.core.errors import UserError
from svd.model.autoencoder import Autoencoder, AutoencoderConfig
from svd.model.formats.diffusers_configs import configuration, learned_mixers
from svd.model.formats.sgm_names import autoencoder_table, invert, is_attention_projection, unet_table
from svd.model.safetensors import Lazy, fill, of_module, read_header_metadata, read_tensors, write_tensors
from svd.model.unet import UNet, UNetConfig

PREFIXES = {
    "unet": "model.diffusion_model.",
    "clip": "conditioner.embedders.0.open_clip.model.",
    "image_autoencoder": "conditioner.embedders.3.encoder.",
    "first_stage": "first_stage_model.",
    "text": "cond_stage_model.model.",
}
# Schedules and averages of SD's training code; they aren't part of the networks.
IGNORED = re.compile(r"model_ema\.|(sqrt_|log_)?(one_minus_)?(betas|alphas_cumprod|posterior_|recip|logvar)|denoiser\.")
METADATA = "svd.config"
HEAD_CHANNELS = 64
ID_EMBEDDING = 256

Tensors = dict[str, Lazy]


@dataclass
class SgmParts:
    """The networks of a single file, names without prefix; `config` is ours, from files that we wrote.

    source: the file, the beginning of messages.
    """

    unet: Tensors = field(default_factory=dict)
    clip: Tensors = field(default_factory=dict)
    image_autoencoder: Tensors = field(default_factory=dict)
    first_stage: Tensors = field(default_factory=dict)
    text: Tensors = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    source: str = "the file"

    def joined(self) -> Tensors:
        """Return all tensors under their full names."""
        return {prefix + name: t for part, prefix in PREFIXES.items() for name, t in getattr(self, part).items()}


def read_sgm(path: Path, sha256: str | None = None) -> SgmParts:
    """Open a single file; return its parts, unread. Raises UserError for broken files and for unknown prefixes."""
    tensors = read_tensors(path, sha256)
    parts, others = split(tensors)
    parts.config, parts.source = stored_facts(path), str(path)
    unknown = [name for name in others if not IGNORED.match(name)]
    if unknown:
        raise UserError(f"{path}: {len(unknown)} tensors under unknown names, such as '{unknown[0]}'; not an sgm file")
    if not parts.unet:
        raise UserError(
            f"{path}: no U-Net ('{PREFIXES['unet']}…'); not an sgm file of Stable Video Diffusion or SD 2.1"
        )
    return parts


def stored_facts(path: Path) -> dict[str, Any]:
    """Return the configuration in the metadata of a file of ours (see `stored_config`); empty for others'.

    Raises UserError, in one line, for a broken file and for facts that aren't ours.
    """
    try:
        facts = json.loads(read_header_metadata(path).get(METADATA, "{}"))
    except ValueError as error:
        raise UserError(f"{path}: '{METADATA}' in its metadata is not valid JSON: {error}") from None
    if not isinstance(facts, dict):
        raise UserError(f"{path}: '{METADATA}' in its metadata isn't an object")
    for name in ("frames", "clip_heads"):
        if name in facts and (type(facts[name]) is not int or facts[name] < 1):
            raise UserError(f"{path}: '{METADATA}' in its metadata: {name} is {facts[name]!r}, not a positive number")
    return facts


def split(tensors: Mapping[str, Lazy]) -> tuple[SgmParts, list[str]]:
    """Sort tensors by part; also return the names that belong to none."""
    parts, others = SgmParts(), []
    for name, tensor in tensors.items():
        part = next((part for part, prefix in PREFIXES.items() if name.startswith(prefix)), None)
        if part is None:
            others.append(name)
        else:
            getattr(parts, part)[name.removeprefix(PREFIXES[part])] = tensor
    return parts, others


def write_sgm(path: Path, parts: SgmParts) -> None:
    """Write a single file, tensor by tensor; `parts.config` goes into its metadata."""
    write_tensors(path, parts.joined(), {"format": "pt", METADATA: json.dumps(parts.config, sort_keys=True)})


def unet_config_of_parts(parts: SgmParts) -> UNetConfig:
    """Return the U-Net's configuration: as stored by us, or from shapes (64 channels per head, ids of 256).

    Raises UserError when a tensor that it follows from is missing or has an impossible shape.
    """
    if "unet" in parts.config:
        return configuration(UNetConfig, parts.config["unet"], f"{parts.source}: '{METADATA}' in its metadata")
    with one_line_errors(f"{parts.source}: U-Net"):
        return _unet_of_shapes(parts.unet)


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turn the errors that a damaged file causes in reading shapes into a UserError of one line."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{what}: tensor {error} is missing") from None
    except (ValueError, TypeError, IndexError, StopIteration, ZeroDivisionError) as error:
        raise UserError(f"{what}: names and shapes of its tensors fit no network of this kind ({error})") from None


def _unet_of_shapes(tensors: Mapping[str, Lazy]) -> UNetConfig:
    downs = sorted(int(m[1]) for name in tensors if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.weight$", name)))
    blocks = len({name.split(".")[1] for name in tensors if name.startswith("input_blocks.")})
    per_level = downs[0] if downs else blocks
    firsts = range(1, blocks, per_level)
    ids = tensors["label_emb.0.0.weight"].shape[1] // ID_EMBEDDING if "label_emb.0.0.weight" in tensors else 0
    context = next((t.shape[1] for name, t in tensors.items() if name.endswith("attn2.to_k.weight")), None)
    if context is None:
        raise ValueError("no cross-attention")
    return UNetConfig(
        in_channels=tensors["input_blocks.0.0.weight"].shape[1],
        out_channels=tensors["out.2.weight"].shape[0],
        block_out_channels=tuple(tensors[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in firsts),
        attention_levels=tuple(f"input_blocks.{i}.1.norm.weight" in tensors for i in firsts),
        layers_per_block=per_level - 1,
        head_channels=HEAD_CHANNELS,
        cross_attention_dim=context,
        id_embedding_dim=ID_EMBEDDING,
        ids=ids,
        temporal=any(".time_stack." in name for name in tensors),
        **_mask(tensors),
    )


def _mask(tensors: Mapping[str, Lazy]) -> dict[str, Any]:
    if "mask_latent" not in tensors:
        return {}
    return {"learned_mask": True, "mask_size": tuple(tensors["mask_latent"].shape[1:])}


def autoencoder_config(tensors: Mapping[str, Lazy], stored: Any = None, source: str = "the file") -> AutoencoderConfig:
    """Return an autoencoder's configuration: as stored by us, or from the shapes of its tensors (SD's scaling factor).

    source: the file, the beginning of messages. Raises UserError when a tensor that it follows from is missing or has
    an impossible shape.
    """
    if stored:
        return configuration(AutoencoderConfig, stored, f"{source}: '{METADATA}' in its metadata")
    with one_line_errors(f"{source}: autoencoder"):
        return _autoencoder_of_shapes(tensors)


def _autoencoder_of_shapes(tensors: Mapping[str, Lazy]) -> AutoencoderConfig:
    levels = 1 + max(int(m[1]) for name in tensors if (m := re.match(r"encoder\.down\.(\d+)\.", name)))
    layers = 1 + max(int(m[1]) for name in tensors if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", name)))
    config = AutoencoderConfig(
        latent_channels=tensors["encoder.conv_out.weight"].shape[0] // 2,
        block_out_channels=tuple(tensors[f"encoder.down.{k}.block.0.conv2.weight"].shape[0] for k in range(levels)),
        layers_per_block=layers,
        temporal_decoder=any(".time_stack." in name for name in tensors),
    )
    with torch.device("meta"):
        Autoencoder(config)  # refuses widths that its groups don't divide
    return config


def first_stage_config(parts: SgmParts) -> AutoencoderConfig:
    """Return the configuration of the first stage."""
    return autoencoder_config(parts.first_stage, parts.config.get("first_stage"), parts.source)


def image_autoencoder_config(parts: SgmParts) -> AutoencoderConfig:
    """Return the configuration of the conditioner's autoencoder: the first stage's with an image decoder."""
    if "first_stage" in parts.config:
        return replace(first_stage_config(parts), temporal_decoder=False)
    return autoencoder_config(parts.image_autoencoder, source=parts.source)


def stored_config(
    unet: UNetConfig, first_stage: AutoencoderConfig | None = None, frames: int | None = None
) -> dict[str, Any]:
    """Return the value of `SgmParts.config`, by which a file of ours at any size can be read back."""
    stored: dict[str, Any] = {"unet": asdict(unet)}
    if first_stage:
        stored["first_stage"] = asdict(first_stage)
    return stored | ({"frames": frames} if frames else {})


def rename(tensors: Mapping[str, Lazy], table: Mapping[str, str]) -> Tensors:
    """Rename tensors; a name that the table lacks is marked and kept, so that `check_fit` reports all at once."""
    return {table.get(name, f"{name} (in the file)"): tensor for name, tensor in tensors.items()}


def unet_from_sgm(tensors: Mapping[str, Lazy], config: UNetConfig) -> Tensors:
    """Rename a U-Net's tensors to diffusers' names."""
    return rename(tensors, invert(unet_table(config)))


def unet_to_sgm(tensors: Mapping[str, Lazy], config: UNetConfig) -> Tensors:
    """Rename a U-Net's tensors to sgm's names."""
    return rename(tensors, unet_table(config))


def autoencoder_from_sgm(tensors: Mapping[str, Lazy], config: AutoencoderConfig) -> Tensors:
    """Convert an autoencoder's tensors to diffusers' names and linear attention."""
    renamed = rename(tensors, invert(autoencoder_table(config)))
    return {
        name: tensor.map(lambda t: t[:, :, 0, 0])
        if is_attention_projection(name) and tuple(tensor.shape[2:]) == (1, 1)
        else tensor
        for name, tensor in renamed.items()
    }


def autoencoder_to_sgm(tensors: Mapping[str, Lazy], config: AutoencoderConfig) -> Tensors:
    """Convert an autoencoder's tensors to sgm's names and 1×1 convolutions for attention."""
    shaped = {
        name: tensor.map(lambda t: t[:, :, None, None]) if is_attention_projection(name) else tensor
        for name, tensor in tensors.items()
    }
    return rename(shaped, autoencoder_table(config))


def diffusers_autoencoder(parts: SgmParts) -> tuple[AutoencoderConfig, Tensors]:
    """Return the autoencoder of a diffusers folder, under diffusers' names.

    Of a temporal first stage, the encoder and `quant_conv` come as a pair from the conditioner's autoencoder, because
    the first stage's own encoder has no quant convolution; the decoder is the first stage's. Raises UserError
    without one.
    """
    config = first_stage_config(parts)
    tensors = dict(parts.first_stage)
    if config.temporal_decoder:
        encoder = {n: t for n, t in parts.image_autoencoder.items() if n.startswith(("encoder.", "quant_conv."))}
        if not encoder:
            raise UserError(f"no '{PREFIXES['image_autoencoder']}…' in the file: the encoder's quant_conv is there")
        tensors = {n: t for n, t in tensors.items() if n.startswith("decoder.")} | encoder
    return config, autoencoder_from_sgm(tensors, config)


def folded_encoder(tensors: Mapping[str, Lazy]) -> Tensors:
    """Return the encoder of a first stage: `quant_conv` folded into `encoder.conv_out` (names are sgm's).

    Exact, because nothing stands between the two: W' = Q·W, b' = Q·b + q.
    """
    quant, bias = tensors["quant_conv.weight"], tensors["quant_conv.bias"]
    found = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    conv, offset = found["encoder.conv_out.weight"], found["encoder.conv_out.bias"]

    def weight() -> torch.Tensor:
        product = torch.einsum("om,mihw->oihw", quant.load().double()[:, :, 0, 0], conv.load().double())
        return product.to(conv.dtype)

    def shift() -> torch.Tensor:
        return (quant.load().double()[:, :, 0, 0] @ offset.load().double() + bias.load().double()).to(offset.dtype)

    found["encoder.conv_out.weight"] = Lazy(conv.shape, conv.dtype, weight)
    found["encoder.conv_out.bias"] = Lazy(offset.shape, offset.dtype, shift)
    return found


@dataclass
class SgmModels:
    """The result of `load_sgm`; `clip` and `text` are open_clip tensors (the visual tower under `visual.`), unread."""

    unet: UNet
    autoencoder: Autoencoder
    clip: Tensors
    text: Tensors


def load_sgm(
    path: Path,
    *,
    sha256: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> SgmModels:
    """Load U-Net and autoencoder of a single file, tensor by tensor.

    sha256: expected hash of the file. dtype: None keeps the stored type. Raises UserError, in one line, for a broken
    file, a wrong hash, pickle, and tensors that are missing, unexpected or misshaped.
    """
    parts = read_sgm(path, sha256)
    unet = build_unet(parts, path, device, dtype)
    return SgmModels(unet, build_autoencoder(parts, path, device, dtype), parts.clip, parts.text)


def build_unet(parts: SgmParts, path: Path, device: torch.device | str, dtype: torch.dtype | None) -> UNet:
    """Build the U-Net of a single file; `path` is for messages."""
    config = unet_config_of_parts(parts)
    with torch.device("meta"):
        unet = UNet(config)
    fill(unet, unet_from_sgm(parts.unet, config), f"{path}: U-Net", device, dtype)
    return unet.eval()


def build_autoencoder(
    parts: SgmParts, path: Path, device: torch.device | str, dtype: torch.dtype | None
) -> Autoencoder:
    """Build the autoencoder of a single file; raise UserError when the file has none."""
    if not parts.first_stage:
        raise UserError(f"{path}: no autoencoder ('{PREFIXES['first_stage']}…') in this file")
    config, tensors = diffusers_autoencoder(parts)
    with torch.device("meta"):
        autoencoder = Autoencoder(config)
    fill(autoencoder, tensors, f"{path}: autoencoder", device, dtype)
    return autoencoder.eval()


def save_sgm(
    path: Path,
    unet: UNet,
    autoencoder: Autoencoder,
    clip: Tensors | None = None,
    frames: int | None = None,
    heads: int | None = None,
) -> None:
    """Write U-Net, autoencoder and (when given) open_clip's image tower as one sgm file.

    frames: what the U-Net was trained on; heads: of the image tower; both kept in the file's metadata.
    The autoencoder's encoder and `quant_conv` go to the conditioner, and folded into one to the first stage; the
    conditioner's image decoder, which nothing uses, is left out unless the autoencoder is an image autoencoder.
    """
    tensors, config = learned_mixers(of_module(unet), unet.config)
    parts = SgmParts(
        unet=unet_to_sgm(tensors, config),
        clip=dict(clip or {}),
        config=stored_config(config, autoencoder.config, frames) | ({"clip_heads": heads} if heads else {}),
    )
    place_autoencoder(parts, autoencoder_to_sgm(of_module(autoencoder), autoencoder.config), autoencoder.config)
    write_sgm(path, parts)


def place_autoencoder(parts: SgmParts, tensors: Tensors, config: AutoencoderConfig) -> None:
    """Put an autoencoder (sgm's names) into first stage and conditioner."""
    if config.temporal_decoder:
        decoder = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
        parts.first_stage = folded_encoder(tensors) | decoder
        parts.image_autoencoder = {n: t for n, t in tensors.items() if n.startswith(("encoder.", "quant_conv."))}
    else:
        parts.first_stage = dict(tensors)
        parts.image_autoencoder = dict(tensors)
