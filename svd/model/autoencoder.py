"""The autoencoder, frames to latents and back (KL-f8 of SD 2.1 with the released temporal decoder).

Legend: B clips, T frames, C latent channels, H×W pixels, h×w latent pixels. State-dict names are those of diffusers'
`AutoencoderKLTemporalDecoder` (`temporal_decoder=True`) and `AutoencoderKL` (`temporal_decoder=False`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from svd.model.autoencoder_blocks import AutoencoderDecoder, AutoencoderEncoder

LOGVAR_RANGE = (-30.0, 20.0)
START_LOGVAR = -6.0


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder; the defaults are SD 2.1's and SVD's (34.2 M + 63.6 M parameters)."""

    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    scaling_factor: float = 0.18215
    temporal_decoder: bool = True
    norm_groups: int = 32


class Autoencoder(nn.Module):
    """Encoder per frame, and a decoder per frame or (with `temporal_decoder`) over frames."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        c = self.config = config
        sizes = (c.latent_channels, c.block_out_channels, c.layers_per_block, c.norm_groups)
        self.encoder = AutoencoderEncoder(c.in_channels, *sizes)
        self.quant_conv = nn.Conv2d(2 * c.latent_channels, 2 * c.latent_channels, 1)
        self.decoder = AutoencoderDecoder(c.in_channels, *sizes, temporal=c.temporal_decoder)
        if not c.temporal_decoder:
            self.post_quant_conv = nn.Conv2d(c.latent_channels, c.latent_channels, 1)

    @property
    def factor(self) -> int:
        """Return the pixels per latent pixel, along height and along width."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def last_layer(self) -> nn.Parameter:
        """Return the weight at which the adaptive weight of the discriminator compares gradients."""
        decoder = self.decoder
        return decoder.time_conv_out.weight if self.config.temporal_decoder else decoder.conv_out.weight

    def encode(self, frames_BTCHW: Tensor, chunk: int | None = None) -> Tensor:
        """Encode frames (B, T, 3, H, W) in [-1, 1] to moments (B, T, 2C, h, w): mean, then log-variance in [-30, 20].

        `chunk` is the number of frames encoded at a time (None: all); it changes memory, not the result.
        Raises ValueError when H or W isn't a multiple of `factor`.
        """
        b, t, _, height, width = frames_BTCHW.shape
        if height % self.factor or width % self.factor:
            raise ValueError(f"frames of {height}x{width}: height and width must be multiples of {self.factor}")
        flat = frames_BTCHW.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        parts = [self.quant_conv(self.encoder(part)) for part in flat.split(chunk or b * t)]
        average, logvar = torch.cat(parts).unflatten(0, (b, t)).chunk(2, dim=2)
        return torch.cat([average, logvar.clamp(*LOGVAR_RANGE)], dim=2)

    def decode(
        self, latents_BTChw: Tensor, chunk: int | None = None, overlap: int = 0, *, image_mode: bool = False
    ) -> Tensor:
        """Decode latents (B, T, C, h, w), divided by the scaling factor, to frames (B, T, 3, H, W) in about [-1, 1].

        chunk: frames decoded together (None: all). The temporal layers see up to 29 frames to each side (14 blocks of
        two (3, 1, 1) convolutions and the last one) and normalise over the whole chunk, so a chunk's result can't equal
        the whole clip's exactly; `overlap` frames shared by neighbouring chunks are cross-faded, which removes the jump
        at the border. 0 is the released script's behaviour (hard borders).
        image_mode: skip the temporal layers; every frame is decoded alone.
        Raises ValueError unless 0 <= overlap < chunk.
        """
        b, t = latents_BTChw.shape[:2]
        if image_mode or not self.config.temporal_decoder:
            flat = latents_BTChw.flatten(0, 1)
            frames = torch.cat([self._decode(part, 0) for part in flat.split(chunk or b * t)])
            return frames.unflatten(0, (b, t))
        if chunk is None or chunk >= t:
            return self._decode(latents_BTChw.flatten(0, 1), t).unflatten(0, (b, t))
        return self._decode_chunks(latents_BTChw, chunk, overlap)

    def _decode(self, latents_NChw: Tensor, frames: int) -> Tensor:
        if not self.config.temporal_decoder:
            latents_NChw = self.post_quant_conv(latents_NChw)
        return self.decoder(latents_NChw.contiguous(memory_format=torch.channels_last), frames)

    def _decode_chunks(self, latents_BTChw: Tensor, chunk: int, overlap: int) -> Tensor:
        total: Tensor | None = None
        b, t = latents_BTChw.shape[:2]
        weights = chunk_weights(t, chunk, overlap).to(latents_BTChw.device)
        for start, weight in zip(chunk_starts(t, chunk, overlap), weights, strict=True):
            part = latents_BTChw[:, start : start + chunk]
            frames = self._decode(part.flatten(0, 1), part.shape[1]).unflatten(0, (b, part.shape[1]))
            if total is None:
                total = frames.new_zeros(b, t, *frames.shape[2:])
            share = weight[start : start + chunk].to(frames.dtype)
            total[:, start : start + chunk] += frames * share[:, None, None, None]
        assert total is not None
        return total

    def forward(self, frames_BTCHW: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return the reconstruction (B, T, 3, H, W) of the posterior's mean, or of a draw, and the moments."""
        moments = self.encode(frames_BTCHW)
        latents = posterior_mean(moments) if generator is None else sample_posterior(moments, generator)
        return self.decode(latents), moments


def fresh_autoencoder(config: AutoencoderConfig, seed: int) -> Autoencoder:
    """Make an autoencoder to train from nothing, a function of (config, seed).

    Residual branches start at zero and the path around them keeps the signal's size, so that the first steps train a
    nearly linear autoencoder; the posterior starts narrow, so that its noise doesn't drown the latent.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = Autoencoder(config)
        for name, module in autoencoder.named_modules():
            if not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            if name.endswith(("conv2", "to_out.0")):
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
        with torch.no_grad():
            autoencoder.quant_conv.weight[config.latent_channels :] *= 0.1
            autoencoder.quant_conv.bias[config.latent_channels :] = START_LOGVAR
    return autoencoder


def chunk_starts(frames: int, chunk: int, overlap: int) -> list[int]:
    """Return the first frame of every chunk; the last chunk is moved back so that all are equally long.

    Raises ValueError unless 0 <= overlap < chunk.
    """
    if not 0 <= overlap < chunk:
        raise ValueError(f"overlap {overlap} must be at least 0 and less than chunk {chunk}")
    starts = list(range(0, max(frames - chunk, 0), chunk - overlap))
    # A hard border (overlap 0) keeps the short last chunk; otherwise it would be decoded with more context than asked.
    last = frames - chunk if overlap else (len(starts) * chunk)
    return [*starts, max(last, 0)]


def chunk_weights(frames: int, chunk: int, overlap: int) -> Tensor:
    """Return cross-fade weights (chunks, frames): linear ramps where two chunks overlap; every column sums to 1."""
    starts = chunk_starts(frames, chunk, overlap)
    weights = torch.zeros(len(starts), frames)
    for row, start in enumerate(starts):
        end = min(start + chunk, frames)
        weights[row, start:end] = 1
        if row:
            shared = starts[row - 1] + chunk - start
            if shared > 0:
                ramp = torch.arange(1, shared + 1) / (shared + 1)
                weights[row, start : start + shared] = ramp
                weights[row - 1, start : start + shared] *= 1 - ramp
    return weights / weights.sum(0, keepdim=True)


def posterior_mean(moments: Tensor) -> Tensor:
    """Return the mean of the posterior, (..., 2C, h, w) to (..., C, h, w), unscaled."""
    return moments.chunk(2, dim=-3)[0]


def sample_posterior(moments: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw from the posterior, (..., 2C, h, w) to (..., C, h, w), unscaled; noise is made where the generator is."""
    average, logvar = moments.chunk(2, dim=-3)
    device = generator.device if generator is not None else moments.device
    noise = torch.randn(average.shape, generator=generator, device=device, dtype=torch.float32)
    return average + (0.5 * logvar).exp() * noise.to(average)


def add_temporal_decoder(image: Autoencoder) -> Autoencoder:
    """Make a temporal autoencoder that starts with the image autoencoder's weights (VideoLDM §3.1.1).

    The temporal branches start at zero and the last time convolution as the identity. `post_quant_conv` has no place
    in the temporal layout and is folded into `decoder.conv_in`: exact but for its bias at the outermost latent pixels,
    where zero padding follows it in the image decoder.
    """
    config = replace(image.config, temporal_decoder=True)
    device = next(image.parameters()).device
    with torch.device(device):
        video = Autoencoder(config).to(next(image.parameters()).dtype)
    state = {temporal_name(k): v.detach().clone() for k, v in image.state_dict().items() if "post_quant" not in k}
    fold_post_quant(state, image.post_quant_conv.weight.detach(), image.post_quant_conv.bias.detach())
    if config.layers_per_block == 1:
        state = {k: v for k, v in state.items() if not k.startswith("decoder.mid_block.resnets.1.")}
    missing, unexpected = video.load_state_dict(state, strict=False)
    fresh = ("temporal_res_block", "time_mixer", "time_conv_out")
    wrong = unexpected + [key for key in missing if not any(part in key for part in fresh)]
    if wrong:
        raise ValueError(f"the image autoencoder doesn't fit the temporal one: {', '.join(wrong[:5])}")
    return video


def temporal_name(key: str) -> str:
    """Return the temporal decoder's name of an image decoder's tensor: residual blocks lie one level deeper."""
    parts = key.split(".")
    if parts[0] == "decoder" and "resnets" in parts:
        parts.insert(parts.index("resnets") + 2, "spatial_res_block")
    return ".".join(parts)


def fold_post_quant(state: dict[str, Tensor], weight: Tensor, bias: Tensor) -> None:
    """Fold a 1×1 convolution (C, C, 1, 1) with bias into `decoder.conv_in`, in place."""
    conv = state["decoder.conv_in.weight"]
    state["decoder.conv_in.bias"] = state["decoder.conv_in.bias"] + conv.sum((2, 3)) @ bias
    state["decoder.conv_in.weight"] = torch.einsum("omhw,mi->oihw", conv, weight[:, :, 0, 0])
