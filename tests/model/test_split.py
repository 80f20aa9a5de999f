"""Ranks that share clips compute what one process computes: output, every gradient, the weights after several steps.

Over gloo, in float64: two ranks share each clip, or four do, compiled, or the two halves of four share a batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from toy_models import randomised

from svd.core.errors import UserError
from svd.model.split import Split, group_norm, shares
from svd.model.unet import UNet, UNetConfig

CLIPS, STEPS = 2, 2
WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]
SIZES = {"block_out_channels": (16, 32), "attention_levels": (True, False), "layers_per_block": 1, "norm_groups": 4}
SIZES |= {"head_channels": 8, "cross_attention_dim": 8, "id_embedding_dim": 8}
CASES: dict[str, dict[str, Any]] = {
    "image-to-video, even": {"frames": 4, "in_channels": 8, "ids": 3, "tokens": 1},
    "image-to-video, uneven": {"frames": 5, "in_channels": 8, "ids": 3, "tokens": 1, "checkpointing": "all"},
    "text-to-video with images among the clips": {"frames": 4, "in_channels": 4, "ids": 2, "tokens": 3},
}


def unet_of(case: dict[str, Any]) -> UNet:
    options = {key: case[key] for key in ("in_channels", "ids", "checkpointing") if key in case}
    unet = randomised(UNet(UNetConfig(**SIZES | options))).double()
    assert isinstance(unet, UNet)
    return unet.train()


def inputs_of(case: dict[str, Any], step: int) -> dict[str, Tensor]:
    """A batch of 15 and, at the lower level, 6 positions; with several tokens each frame has its own, and one clip is
    made of images."""
    draw = torch.Generator().manual_seed(step)

    def normal(*shape: int) -> Tensor:
        return torch.randn(CLIPS, *shape, generator=draw, dtype=torch.float64)

    several = case["tokens"] > 1
    values = {"x": normal(case["frames"], case["in_channels"], 3, 5), "target": normal(case["frames"], 4, 3, 5)}
    values |= {"context": normal(*[case["frames"]] * several, case["tokens"], 8), "ids": normal(case["ids"])}
    return values | {"noise": normal(), "images": torch.tensor([False, several])}


def loss_of(unet: UNet, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    out = unet(values["x"], values["noise"], values["context"], values["ids"], image_only_B=values["images"])
    return out, (out - values["target"]).square().mean()


def train(case: dict[str, Any], split: Split, clips: slice = slice(None), compiled: bool = False) -> dict[str, Tensor]:
    """Outputs, gradients of the first step and weights after the last one."""
    unet = unet_of(case)
    unet.split = split
    if compiled:
        unet.compile_blocks(backend="aot_eager")
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        out, loss = loss_of(unet, {key: value[clips] for key, value in inputs_of(case, step).items()})
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in unet.named_parameters():
            if parameter.grad is not None:
                average(parameter.grad)
                found.setdefault(f"gradient of {name}", parameter.grad.clone())
        optimizer.step()
        found[f"output {step}"] = out.detach()
    return found | {f"weight {name}": parameter.detach() for name, parameter in unet.named_parameters()}


def average(gradient: Tensor) -> None:
    """As DDP and FSDP do."""
    if dist.is_initialized():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()


def run_rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for ranks in {world, 2}:
        group, _ = dist.new_subgroups(ranks)
        split, clips = Split(dist.get_rank(group), ranks, group), slice(None)
        if ranks < world:
            clips = slice(rank // ranks, rank // ranks + 1)
        for number, case in enumerate(CASES.values()):
            torch.save(train(case, split, clips, compiled=ranks == 4), folder / f"{number}-{ranks}-{rank}.pt")
        large_mean(split)
    dist.destroy_process_group()


def large_mean(split: Split) -> None:
    """Statistics stay exact where the mean is far larger than the deviation."""
    draw = torch.Generator().manual_seed(0)
    x = 300 + torch.randn(2, 3, 7, 8, generator=draw)
    layer = torch.nn.GroupNorm(2, 8)
    mine = x.split(shares(7, split.ranks), dim=2)[split.rank]
    expected = layer.double()(x.double().movedim(-1, 1)).movedim(1, -1).split(shares(7, split.ranks), dim=2)[split.rank]
    torch.testing.assert_close(group_norm(layer.float(), mine, split).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_that_share_clips_equal_one(world: int, tmp_path: Path) -> None:
    start_processes(run_rank, (world, tmp_path), world, start_method="forkserver")
    for number, case in enumerate(CASES.values()):
        one = train(case, Split())
        moved = (one["weight conv_out.weight"] - unet_of(case).conv_out.weight).abs().max()
        assert moved > 1e-3, "training moved nothing that could differ"
        for path in tmp_path.glob(f"{number}-*.pt"):
            _, ranks, rank = (int(part) for part in path.stem.split("-"))
            found = torch.load(path, weights_only=True)
            assert found.keys() == one.keys()
            for key, value in found.items():
                half = ranks < world and key.startswith("output")
                expected = one[key][rank // ranks :][:1] if half else one[key]
                message = f"{path.stem}, {key}: {{}}".format
                torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11, msg=message)
    assert len(list(tmp_path.glob("*.pt"))) == len(CASES) * (world if world == 2 else 2 * world)


def test_too_few_frames_or_positions_are_told() -> None:
    unet = UNet(UNetConfig(**SIZES, ids=0))
    unet.split = Split(ranks=3)  # without a group nothing is sent

    def run(frames: int, height: int) -> None:
        unet(torch.zeros(1, frames, 4, height, 2), torch.zeros(1), torch.zeros(1, 1, 8))

    run(3, 6)
    with pytest.raises(ValueError, match="3 ranks can't share 2 frames"):
        run(2, 6)
    with pytest.raises(UserError, match="3 ranks can't share a frame of 2 positions; lower 'context_ranks'"):
        run(3, 4)
