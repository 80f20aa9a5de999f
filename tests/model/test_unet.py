"""What the U-Net promises: modes, masks, contexts, clips that don't see each other, checkpoints, compilation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from svd.model.blocks import TemporalTransformerBlock, TransformerBlock
from svd.model.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    block_out_channels=(32, 64),
    attention_levels=(True, False),
    layers_per_block=1,
    head_channels=16,
    cross_attention_dim=24,
    id_embedding_dim=32,
)


def make(config: UNetConfig = CONFIG, seed: int = 0) -> UNet:
    """A U-Net without zeros in its weights."""
    torch.manual_seed(seed)
    unet = UNet(config)
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return unet.eval()


def inputs(batch: int = 2, frames: int = 5, tokens: int = 3, channels: int = 4, ids: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(batch, frames, channels, 4, 6, generator=generator),
        torch.randn(batch, generator=generator),
        torch.randn(batch, tokens, 24, generator=generator),
        torch.rand(batch, ids, generator=generator) * 20,
    )


@pytest.fixture(scope="module")
def unet() -> UNet:
    return make()


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@settings(deadline=None, max_examples=20)
@given(
    batch=st.integers(1, 3),
    frames=st.integers(1, 6),
    tokens=st.integers(1, 3),
    height=st.integers(3, 7),
    width=st.integers(3, 7),
)
def test_any_number_of_frames_and_any_size(batch: int, frames: int, tokens: int, height: int, width: int) -> None:
    x = torch.randn(batch, frames, 4, height, width)
    y = make()(x, torch.zeros(batch), torch.randn(batch, tokens, 24), torch.zeros(batch, 2))
    assert y.shape == x.shape and y.is_contiguous() and y.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 3])
def test_clips_do_not_see_each_other(unet: UNet, tokens: int) -> None:
    arguments = inputs(3, tokens=tokens)
    together = unet(*arguments)
    for index in range(3):
        alone = unet(*(argument[index : index + 1] for argument in arguments))
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=1e-5)
    changed = [argument.clone() for argument in arguments]
    for argument in changed:
        argument[1:] += 1
    torch.testing.assert_close(unet(*changed)[0], together[0], atol=1e-6, rtol=0)
    assert (unet(*changed)[1] - together[1]).abs().max() > 0.01


def test_frames_see_each_other_unless_they_are_images(unet: UNet) -> None:
    x, c_noise, context, ids = inputs(1)
    other = x.clone()
    other[:, 1:] += 1
    assert (unet(x, c_noise, context, ids)[:, 0] - unet(other, c_noise, context, ids)[:, 0]).abs().max() > 1e-3
    images = [unet(v, c_noise, context, ids, image_mode=True)[:, 0] for v in (x, other)]
    torch.testing.assert_close(*images, atol=1e-6, rtol=0)


def test_images_may_come_in_any_order(unet: UNet) -> None:
    x, c_noise, context, ids = inputs(2)
    order = torch.tensor([3, 1, 4, 0, 2])
    expected = unet(x, c_noise, context, ids, image_mode=True)[:, order]
    torch.testing.assert_close(
        unet(x[:, order], c_noise, context, ids, image_mode=True), expected, atol=1e-5, rtol=1e-5
    )


def test_image_mode_runs_no_temporal_layer(unet: UNet) -> None:
    def fail(module: nn.Module, arguments: object) -> None:
        raise AssertionError(f"{type(module).__name__} ran")

    temporal = [m for name, m in unet.named_modules() if "temporal" in name or "time_pos" in name or "mixer" in name]
    hooks = [module.register_forward_pre_hook(fail) for module in temporal]
    try:
        unet(*inputs(), image_mode=True)
        with pytest.raises(AssertionError, match="ran"):
            unet(*inputs())
    finally:
        for hook in hooks:
            hook.remove()


def test_mask_of_images_is_image_mode_clip_by_clip(unet: UNet) -> None:
    arguments = inputs(3)
    video, images = unet(*arguments), unet(*arguments, image_mode=True)
    mixed = unet(*arguments, image_only_B=torch.tensor([False, True, False]))
    torch.testing.assert_close(mixed[1], images[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed[[0, 2]], video[[0, 2]], atol=1e-6, rtol=0)
    assert (video[1] - images[1]).abs().max() > 0.01


def test_alpha_one_is_the_image_model() -> None:
    unet = make()
    for name, parameter in unet.named_parameters():
        if name.endswith("mix_factor"):
            parameter.fill_(100.0)
    arguments = inputs()
    torch.testing.assert_close(unet(*arguments), unet(*arguments, image_mode=True), atol=1e-6, rtol=0)


def test_temporal_residual_blocks_start_as_the_identity() -> None:
    """In a fresh model temporal residual blocks change nothing; temporal transformers would, so they are set aside."""
    torch.manual_seed(0)
    unet = UNet(replace(CONFIG, attention_levels=(False, False)))
    for level in (unet.mid_block,):
        level.attentions[0].time_mixer.mix_factor.fill_(100.0)
    nn.init.normal_(unet.conv_out.weight)
    for name, parameter in unet.named_parameters():
        if "spatial_res_block.conv2" in name or "proj_out" in name:
            nn.init.normal_(parameter, std=0.1)
    arguments = inputs()
    video = unet(*arguments)
    assert video.std() > 0.1
    torch.testing.assert_close(video, unet(*arguments, image_mode=True), atol=1e-6, rtol=0)


def test_a_fresh_model_predicts_zero() -> None:
    assert not UNet(CONFIG)(*inputs()).any()


@pytest.fixture
def contexts_seen(unet: UNet) -> Iterator[dict[type, set[int]]]:
    """Which context objects spatial and temporal transformer blocks were given."""
    seen: dict[type, set[int]] = {TransformerBlock: set(), TemporalTransformerBlock: set()}

    def note(module: nn.Module, arguments: tuple[Tensor, Tensor]) -> None:
        seen[type(module)].add(arguments[1].data_ptr())

    blocks = [module for module in unet.modules() if isinstance(module, TransformerBlock)]
    hooks = [block.register_forward_pre_hook(note) for block in blocks]
    yield seen
    for hook in hooks:
        hook.remove()


def test_temporal_prompt_reaches_the_temporal_layers_alone(unet: UNet, contexts_seen: dict[type, set[int]]) -> None:
    x, c_noise, context, ids = inputs()
    prompt = torch.randn(2, 7, 24)
    expected = unet(x, c_noise, context, ids)
    torch.testing.assert_close(unet(x, c_noise, context, ids, time_context_BLD=context), expected)
    contexts_seen[TransformerBlock].clear()
    contexts_seen[TemporalTransformerBlock].clear()
    got = unet(x, c_noise, context, ids, time_context_BLD=prompt)
    assert contexts_seen == {TransformerBlock: {context.data_ptr()}, TemporalTransformerBlock: {prompt.data_ptr()}}
    assert (got - expected).abs().max() > 1e-3


@pytest.mark.parametrize("tokens", [1, 3])
def test_one_context_for_every_frame(unet: UNet, tokens: int) -> None:
    x, c_noise, context, ids = inputs(tokens=tokens)
    repeated = context[:, None].expand(-1, 5, -1, -1)
    expected = unet(x, c_noise, context, ids)
    torch.testing.assert_close(unet(x, c_noise, repeated, ids), expected, atol=1e-5, rtol=1e-5)
    different = torch.cat([repeated[:, :4], torch.randn(2, 1, tokens, 24)], dim=1)
    images = unet(x, c_noise, different, ids, image_mode=True)
    plain = unet(x, c_noise, context, ids, image_mode=True)
    torch.testing.assert_close(images[:, :4], plain[:, :4], atol=1e-5, rtol=1e-5)
    assert (images[:, 4] - plain[:, 4]).abs().max() > 1e-3


@pytest.mark.parametrize(("channels", "ids"), [(4, 0), (4, 2), (8, 3), (9, 3), (8, 4)])
def test_variants_depend_on_every_id(channels: int, ids: int) -> None:
    unet = make(replace(CONFIG, in_channels=channels, ids=ids))
    x, c_noise, context, values = inputs(1, 2, 1, channels, ids)
    assert hasattr(unet, "add_embedding") == bool(ids)
    expected = unet(x, c_noise, context, values if ids else None)
    assert expected.shape == (1, 2, 4, 4, 6)
    for index in range(ids):
        changed = values.clone()
        changed[:, index] += 3
        assert (unet(x, c_noise, context, changed) - expected).abs().max() > 1e-5


@pytest.mark.parametrize("mixer", ["fixed", "learned", "learned_with_images"])
def test_mixers(mixer: str) -> None:
    unet = make(replace(CONFIG, mixer=mixer))  # type: ignore[arg-type]
    parameters = {name for name, _ in unet.named_parameters() if name.endswith("mix_factor")}
    state = {name for name in unet.state_dict() if name.endswith("mix_factor")}
    assert len(state) == 12 and parameters == (set() if mixer == "fixed" else state)
    assert unet(*inputs()).isfinite().all()
    if mixer != "learned_with_images":
        with pytest.raises(ValueError, match="learned_with_images"):
            unet(*inputs(), image_only_B=torch.tensor([True, False]))


def test_mask_latent_is_learned_and_fits_other_sizes() -> None:
    unet = make(replace(CONFIG, in_channels=9, ids=3, learned_mask=True, mask_size=(4, 6)))
    assert unet.state_dict()["mask_latent"].shape == (4, 4, 6)
    first, last = torch.randn(2, 2, 4, 4, 6)
    with torch.enable_grad():
        channels = unet.interpolation_channels(first, last, 5)
        assert channels.shape == (2, 5, 5, 4, 6)
        channels.sum().backward()
    assert unet.mask_latent.grad is not None and (unet.mask_latent.grad == 6).all()  # 2 clips x 3 frames
    torch.testing.assert_close(channels[:, 0, :4], first)
    torch.testing.assert_close(channels[:, 4, :4], last)
    for frame in (1, 2, 3):
        torch.testing.assert_close(channels[:, frame, :4], unet.mask_latent.expand(2, -1, -1, -1))
    assert channels[:, :, 4].flatten(2).mean(-1).tolist() == [[1, 0, 0, 0, 1]] * 2
    assert unet.masked_latent(8, 12).shape == (4, 8, 12)
    assert unet(torch.cat([torch.randn(2, 5, 4, 4, 6), channels], 2), *inputs(ids=3)[1:]).shape == (2, 5, 4, 4, 6)
    with pytest.raises(ValueError, match="learned_mask"):
        make().masked_latent(4, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_channels": (32,)}, "attention_levels has 2"),
        ({"block_out_channels": (32, 48)}, "48 must be a multiple of 32"),
        ({"head_channels": 24}, "of head_channels 24"),
    ],
)
def test_impossible_sizes_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_wrong_inputs_are_refused(unet: UNet) -> None:
    x, c_noise, context, ids = inputs()
    with pytest.raises(ValueError, match=r"takes \(B, T, 4, H, W\), got \(2, 4, 4, 6\)"):
        unet(x[:, 0], c_noise, context, ids)
    with pytest.raises(ValueError, match=r"must be \(B, L, 24\)"):
        unet(x, c_noise, context[..., :5], ids)
    with pytest.raises(ValueError, match="conditioned on 2 ids, got 0"):
        unet(x, c_noise, context)


@pytest.mark.parametrize("policy", ["fine", "all"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_checkpointing_changes_no_gradient(policy: str, tokens: int) -> None:
    plain = make()
    saving = make(replace(CONFIG, checkpointing=policy))  # type: ignore[arg-type]
    gradients = []
    for unet in (plain, saving):
        with torch.enable_grad():
            unet(*inputs(tokens=tokens)).square().sum().backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_blocks_are_all_residual_blocks_and_transformers() -> None:
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    kinds = [type(block).__name__ for block in unet.blocks()]
    assert kinds.count("VideoResBlock") == 22 and kinds.count("Transformer") == 16 and len(kinds) == 38


def test_half_precision_stays_close(unet: UNet) -> None:
    arguments = inputs()
    expected = unet(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        automatic = unet(*arguments)
    half = make().bfloat16()
    x, c_noise, context, ids = arguments
    cast = half(x.bfloat16(), c_noise, context.bfloat16(), ids)
    assert automatic.dtype == cast.dtype == torch.bfloat16
    for got in (automatic, cast):
        assert (got - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("images", [False, True])
def test_the_graph_has_no_breaks(unet: UNet, images: bool) -> None:
    """fullgraph raises on a break. Training and the code generation of inductor are in a slow test."""
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    arguments = inputs()
    expected = unet(*arguments, image_mode=images)
    torch.testing.assert_close(compiled(*arguments, image_mode=images), expected, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "config", "tokens"),
    [
        ("aot_eager", replace(CONFIG, checkpointing="all"), 3),
        ("inductor", replace(CONFIG, block_out_channels=(32,), attention_levels=(False,)), 1),
    ],
    ids=["backward-graph", "generated-code"],
)
def test_compiled_training_step(backend: str, config: UNetConfig, tokens: int) -> None:
    """The generated code is tested on one level with a transformer in the middle: a C++ compiler runs for minutes."""
    plain, compiled = make(config), make(config)
    results = []
    for unet, run in ((plain, plain), (compiled, torch.compile(compiled, fullgraph=True, backend=backend))):
        with torch.enable_grad():
            output = run(*inputs(tokens=tokens))
            output.square().sum().backward()
        results.append((output, {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-4, rtol=1e-3)


def test_compiled_blocks_are_all_compiled(unet: UNet) -> None:
    """Past dynamo's limit of variants a function runs eagerly (an error with fullgraph): compile_blocks raises it."""
    expected = unet(*inputs())
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            one_by_one = make()
            for block in one_by_one.blocks():
                block.compile(backend="eager", fullgraph=True)
            one_by_one(*inputs())
        torch._dynamo.reset()
        compiled = make()
        compiled.compile_blocks(backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs()), expected, atol=1e-5, rtol=1e-5)


def test_blocks_are_compiled_for_sizes_as_they_are() -> None:
    """Blocks of one class and several widths are not taken for one function of changing shape."""
    sizes: list[object] = []

    def backend(module: torch.fx.GraphModule, arguments: list[Any]) -> Any:
        sizes.extend(arguments)
        return module.forward

    torch._dynamo.reset()
    unet = make()
    unet.compile_blocks(backend=backend)
    unet(*inputs())
    assert sizes and not any(isinstance(value, torch.SymInt) for value in sizes)
