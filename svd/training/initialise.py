"""First weights of a stage: fresh, or carried over from a stage whose shapes may be narrower (§2, D.2–D.6)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from svd.config import Preset
from svd.core.errors import UserError
from svd.latents.cache import digest
from svd.model.autoencoder import AutoencoderConfig
from svd.model.unet import UNet, UNetConfig
from svd.tasks.base import Task

# Parts of video models alone: fresh in a video model made from an image model, dropped the other way round.
VIDEO_PARTS = ("temporal_", "time_pos_embed", "time_mixer", "add_embedding")


def autoencoder_config(preset: Preset) -> AutoencoderConfig:
    """Return the configuration of the image autoencoder that a preset trains."""
    sizes = preset.model.autoencoder
    return AutoencoderConfig(
        latent_channels=sizes.latent_channels,
        block_out_channels=tuple(sizes.block_out_channels),
        layers_per_block=sizes.layers_per_block,
        scaling_factor=sizes.scaling_factor or 1.0,
        norm_groups=sizes.norm_groups,
    )


def unet_config(preset: Preset, task: Task, latent_size: tuple[int, int]) -> UNetConfig:
    """Return the configuration of a task's U-Net; `latent_size` (height, width) sizes the learned mask embedding."""
    sizes = preset.model.unet
    channels = preset.model.autoencoder.latent_channels
    return UNetConfig(
        block_out_channels=tuple(sizes.block_out_channels),
        attention_levels=tuple(sizes.attention_levels),
        layers_per_block=sizes.layers_per_block,
        head_channels=sizes.head_channels,
        cross_attention_dim=sizes.cross_attention_dim,
        id_embedding_dim=sizes.id_embedding_dim,
        norm_eps=sizes.norm_eps,
        norm_groups=sizes.norm_groups,
        mixer=sizes.mixer,
        in_channels=task.in_channels(channels),
        out_channels=channels,
        ids=task.ids,
        temporal=task.temporal,
        learned_mask=task.learned_mask,
        mask_size=latent_size,
    )


def fresh_unet(config: UNetConfig, seed: int, stage: str, position_gain: float = 1.0) -> UNet:
    """Make a randomly initialised U-Net, a function of its arguments.

    The embedding of the conditioning ids starts at zero, so a model that gains them first computes the same as before.
    position_gain: how many times wider than usual both layers of the embedding of a frame's position start.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(digest("initial weights", seed, stage)[:15], 16))
        unet = UNet(config)
        if config.ids:
            nn.init.zeros_(unet.add_embedding.linear_2.weight)
            nn.init.zeros_(unet.add_embedding.linear_2.bias)
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if "time_pos_embed" in name and name.endswith("weight"):
                    parameter *= position_gain
    return unet


def carry_over(source: UNet, target: UNet, origin: str) -> UNet:
    """Copy the weights of `source` into `target`, where it has them, and return `target`.

    New input channels of the first convolution and new conditioning ids start at zero, so the model first ignores
    them: 4 channels become 8 (D.4) or 9 (D.5). Temporal layers and the learned mask, where only the target has them,
    keep their initial values; in image mode an inflated model computes what the image model does. The weights of the
    mixers are kept where one model has learned ones and the other fixed ones. Raises UserError when the rest doesn't
    fit.
    """
    given, state = _names_of(target, _mixed_alike(source, target)), target.state_dict()
    _check_parts(given, state, target.config.temporal, origin)
    with torch.no_grad():
        for name, tensor in state.items():
            if name not in given:
                continue
            widened = name in ("conv_in.weight", "add_embedding.linear_1.weight")
            if not _place(given[name], tensor, widened):
                raise UserError(
                    f"{origin}: '{name}' is {tuple(given[name].shape)}, in the preset's model {tuple(tensor.shape)}; "
                    "make the sizes in 'model.unet' those of these weights"
                )
    return target


def _mixed_alike(source: UNet, target: UNet) -> dict[str, Tensor]:
    """Return the state of `source` with the mixers' weights α as `target` stores them: α when fixed, else its logit."""
    state, (before, after) = source.state_dict(), (unet.config.mixer == "fixed" for unet in (source, target))
    if before != after and target.config.temporal:
        convert = torch.logit if before else torch.sigmoid
        state |= {name: convert(factor) for name, factor in state.items() if name.endswith("mix_factor")}
    return state


def _check_parts(given: Mapping[str, Tensor], state: Mapping[str, Tensor], temporal: bool, origin: str) -> None:
    """Raise UserError when one of the models has layers without a counterpart, other than the parts of video models."""
    lost = sorted(given.keys() - state.keys() - {"mask_latent"})
    if not temporal:
        lost = [name for name in lost if not any(part in name for part in VIDEO_PARTS)]
    if lost:
        raise UserError(f"{origin}: the preset's model has no place for '{lost[0]}' and {len(lost) - 1} more tensors")
    fresh = sorted(state.keys() - given.keys() - {"mask_latent"})
    fresh = [name for name in fresh if not any(part in name for part in VIDEO_PARTS)]
    if fresh:
        raise UserError(
            f"{origin}: lacks '{fresh[0]}' and {len(fresh) - 1} more tensors of the preset's model; make the sizes in "
            "'model.unet' those of these weights"
        )


def _names_of(target: UNet, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state under the target's names: residual blocks of a video model lie one level deeper."""
    image = not any(".spatial_res_block." in name for name in state)
    if target.config.temporal and image:
        deeper = r"\1.spatial_res_block."
        return {re.sub(r"(resnets\.\d+)\.", deeper, name): tensor for name, tensor in state.items()}
    if not target.config.temporal and not image:
        return {name.replace(".spatial_res_block", ""): tensor for name, tensor in state.items()}
    return dict(state)


def _place(given: Tensor, tensor: Tensor, widened: bool) -> bool:
    """Copy `given` into `tensor`; return False when the shapes differ.

    When `widened`, it may be narrower along dimension 1; the rest is zero.
    """
    if given.shape == tensor.shape:
        tensor.copy_(given)
        return True
    fits = widened and given.shape[0] == tensor.shape[0] and given.shape[2:] == tensor.shape[2:]
    if not fits or given.shape[1] >= tensor.shape[1]:
        return False
    tensor.zero_()
    tensor[:, : given.shape[1]].copy_(given)
    return True


def with_checkpointing(unet: UNet, checkpointing: str) -> UNet:
    """Return the same weights in a model that recomputes these activations: "none", "fine" or "all"."""
    config = replace(unet.config, checkpointing=checkpointing)  # type: ignore[arg-type]
    with torch.device("meta"):
        other = UNet(config)
    other.load_state_dict(unet.state_dict(), assign=True)
    for parameter in other.parameters():
        parameter.requires_grad_(True)
    return other
