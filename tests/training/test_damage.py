"""A training stops at the first NaN with finite checkpoints behind it, and goes on past a damaged checkpoint."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from toy_training import PHASE, toy_context, toy_preset, write_toy_autoencoder

from svd.core.errors import UserError
from svd.latents.cache import LatentCache, write_index, write_shard
from svd.latents.loader import Draws, Examples
from svd.stage import StageContext
from svd.training import callbacks, module
from svd.training.checkpoint_files import Damaged, checkpoints, newest_checkpoint, prune, require_whole
from svd.training.finite import NotFinite, explain
from svd.training.sharded_checkpoints import readable_checkpoint
from svd.training.stages import run_image_pretraining, run_image_to_video, run_video_pretraining

TRAINED = 3  # a clip of the training split
Damage = Callable[[Path], None]


def weights(context: StageContext) -> dict[str, torch.Tensor]:
    return load_file(context.output / "unet" / "diffusion_pytorch_model.safetensors")


def finite(checkpoint: Path) -> bool:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return all(bool(torch.isfinite(value).all()) for value in state.values())


def spoil(shard: Path, row: int) -> None:
    """Put NaN into the latents of one clip, as a writer without a check would."""
    tensors = load_file(shard)
    tensors["moments"][row, :, 0, 0, 0] = torch.nan
    save_file(tensors, shard)


def image_model(folder: Path) -> Path:
    run_image_pretraining(toy_context(folder, "image-pretraining"))
    return folder / "outputs" / "image-pretraining"


def test_nan_in_the_data_names_the_clip_and_costs_no_checkpoint(tmp_path: Path) -> None:
    context = toy_context(tmp_path, "first", toy_preset(checkpoint_every=1))
    shard = context.inputs["latents"] / "shards" / "toy.safetensors"
    whole = shard.read_bytes()
    run_image_pretraining(toy_context(tmp_path, "undisturbed", toy_preset(checkpoint_every=1)))
    spoil(shard, TRAINED)
    with pytest.raises(UserError, match=rf"clip-{TRAINED}, row {TRAINED} of shards/toy.safetensors") as caught:
        run_image_pretraining(context)
    assert "whose latents hold NaN or infinity" in str(caught.value) and "stage 'latents' again" in str(caught.value)
    (kept,) = (context.work / "phase-0").glob("not-finite-*.safetensors")
    assert load_file(kept)["latents"].isnan().any()
    assert all(finite(path) for path in checkpoints(context.work / "phase-0"))
    shard.write_bytes(whole)
    run_image_pretraining(context)
    undisturbed = load_file(tmp_path / "outputs" / "undisturbed" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(value.equal(undisturbed[name]) for name, value in weights(context).items())


def test_nan_in_the_weights_stops_before_the_next_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = toy_context(tmp_path, "spoilt", toy_preset(checkpoint_every=2))
    original = callbacks.Averaging.on_train_batch_end

    def poison(self: callbacks.Averaging, trainer: Any, trained: Any, *arguments: object) -> None:
        original(self, trainer, trained, *arguments)
        if trainer.global_step == 3:
            with torch.no_grad():
                trained.unet.conv_in.weight[0] = torch.nan

    monkeypatch.setattr(callbacks.Averaging, "on_train_batch_end", poison)
    with pytest.raises(UserError, match=r"stopped at step 4: .*whose data is finite: lower 'learning_rate'"):
        run_image_pretraining(context)
    (kept,) = checkpoints(context.work / "phase-0")
    assert kept.name == "step=2.ckpt" and finite(kept)


def test_an_infinite_gradient_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = toy_context(tmp_path, "steep", toy_preset(checkpoint_every=2))
    original, calls = torch.nn.utils.clip_grad_norm_, []

    def explode(parameters: Any, limit: float) -> torch.Tensor:
        calls.append(1)
        norm = original(parameters, limit)
        return norm * torch.inf if len(calls) == 3 else norm

    monkeypatch.setattr(module.nn.utils, "clip_grad_norm_", explode)
    with pytest.raises(UserError, match=r"stopped at step 3: the gradient is NaN or infinite"):
        run_image_pretraining(context)
    assert [path.name for path in checkpoints(context.work / "phase-0")] == ["step=2.ckpt"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage: Damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image, every = image_model(tmp_path), toy_preset(checkpoint_every=1)
    run_video_pretraining(toy_context(tmp_path, "undisturbed", every, image_pretraining=image))
    killed = toy_context(tmp_path, "killed", every, image_pretraining=image)
    original = callbacks.Averaging.on_train_batch_end

    def die(self: callbacks.Averaging, trainer: Any, *arguments: object) -> None:
        original(self, trainer, *arguments)
        if trainer.global_step == 5:
            raise InterruptedError

    with monkeypatch.context() as dying, pytest.raises(InterruptedError):
        dying.setattr(callbacks.Averaging, "on_train_batch_end", die)
        run_video_pretraining(killed)
    folder = killed.work / "phase-0"
    assert [path.name for path in checkpoints(folder)] == ["step=4.ckpt", "step=3.ckpt"]
    damage(folder / "step=4.ckpt")
    run_video_pretraining(killed)
    assert "step=4.ckpt is damaged" in caplog.text
    assert not checkpoints(folder)
    undisturbed = load_file(tmp_path / "outputs" / "undisturbed" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(value.equal(undisturbed[name]) for name, value in weights(killed).items())


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("__0_0.distcp", truncate),
        ("__0_0.distcp", flip),
        ("meta.pt", truncate),
        ("meta.pt", flip),
        (".metadata", truncate),
    ],
)
def test_a_damaged_part_of_a_sharded_checkpoint_is_noticed(name: str, damage: Damage, tmp_path: Path) -> None:
    for step in (2, 4):
        folder = tmp_path / f"step={step}.ckpt"
        dcp.save({"a": torch.randn(64, 64), "b": torch.randn(128)}, checkpoint_id=folder, no_dist=True)
        torch.save({"global_step": step, "rows": [1.0] * 200}, folder / "meta.pt")
        require_whole(folder)
    damage(tmp_path / "step=4.ckpt" / name)
    with pytest.raises(Damaged):
        require_whole(tmp_path / "step=4.ckpt")
    assert newest_checkpoint(tmp_path) == tmp_path / "step=2.ckpt"
    assert not (tmp_path / "step=4.ckpt").exists()


def test_no_flipped_bit_in_the_directory_of_a_checkpoint_ends_the_program(tmp_path: Path) -> None:
    """Some ask for a password, a compression or a later version of the format. What passes can be loaded."""
    path = tmp_path / "step=2.ckpt"
    torch.save({"global_step": 2}, path)
    whole = path.read_bytes()
    raised: Counter[str] = Counter()
    for place in range(whole.index(b"PK\1\2"), len(whole)):
        for bit in (0, 3, 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                require_whole(path)
                assert torch.load(path, weights_only=True) == {"global_step": 2}
                raised["nothing"] += 1
            except Exception as error:
                raised[type(error).__name__] += 1
    assert set(raised) == {"Damaged", "nothing"} and raised["Damaged"] > raised["nothing"] / 4, raised


class Ran:
    """Raises when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code of a checkpoint ran')",)


def test_a_checkpoint_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"global_step": 2, "more": Ran()}, tmp_path / "step=2.ckpt")
    with pytest.raises(Damaged, match="Weights only load failed"):
        require_whole(tmp_path / "step=2.ckpt")


@pytest.mark.parametrize("damage", [truncate, flip])
def test_damaged_merged_shards_are_merged_again(damage: Damage, tmp_path: Path) -> None:
    folder = tmp_path / "step=2.ckpt"
    weights = torch.randn(64, 64)
    dcp.save({"a": weights}, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 2}, folder / "meta.pt")
    whole = readable_checkpoint(folder, "auto")
    assert whole is not None
    damage(whole)
    assert readable_checkpoint(folder, "auto") == whole
    assert torch.load(whole, weights_only=True)["a"].equal(weights)


def test_a_clip_without_caption_has_the_empty_prompt(tmp_path: Path) -> None:
    context = toy_context(tmp_path, "silent", toy_preset())
    folder = context.inputs["latents"].rename(tmp_path / "source")
    tensors = load_file(folder / "shards" / "toy.safetensors")
    silent = tmp_path / "latents"
    write_shard(silent / "shards" / "toy.safetensors", {n: t for n, t in tensors.items() if n != "text"})
    cache = LatentCache(folder)
    rows = [{**row, "captions": []} for row in cache.index.rows]
    write_index(silent, rows, cache.facts, cache.null_text)
    assert run_image_pretraining(context).metrics["steps"] == 6
    started = toy_context(tmp_path, "next", video_pretraining=context.output, image_pretraining=context.output)
    assert run_image_to_video(started).metrics["steps"] == 6


def test_no_shard_with_nan_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x.safetensors: NaN or infinity in moments; nothing is written"):
        write_shard(tmp_path / "x.safetensors", {"image": torch.ones(2), "moments": torch.tensor([1.0, torch.inf])})
    assert not list(tmp_path.iterdir())


def test_latents_of_another_autoencoder_are_refused(tmp_path: Path) -> None:
    context = toy_context(tmp_path, "mixed")
    other = write_toy_autoencoder(tmp_path / "other")
    path = other / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    mixed = toy_context(tmp_path, "mixed", autoencoder=other)
    with pytest.raises(UserError, match=r"these latents are of the autoencoder \w{12}, not of \w{12}; run the stage"):
        run_image_pretraining(mixed)
    assert run_image_pretraining(context).metrics["steps"] == 6


def split_shard(folder: Path) -> None:
    """Move the clips after the eighth into a shard of their own, `second.safetensors`."""
    cache = LatentCache(folder)
    tensors = load_file(folder / "shards" / "toy.safetensors")
    text = tensors.pop("text")
    for name, part in (("toy", slice(0, 8)), ("second", slice(8, None))):
        shard = {key: value[part].contiguous() for key, value in tensors.items()} | {"text": text}
        save_file(shard, folder / "shards" / f"{name}.safetensors")
    rows = [
        row | ({"shard": "second.safetensors", "row": row["row"] - 8} if row["row"] >= 8 else {})
        for row in pl.read_parquet(folder / "index.parquet").to_dicts()
    ]
    write_index(folder, rows, cache.facts, cache.null_text)


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_damaged_samples_cost_themselves(damage: Damage, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = toy_context(tmp_path, "holes", toy_preset(damaged_share=0.5))
    split_shard(context.inputs["latents"])
    damage(context.inputs["latents"] / "shards" / "second.safetensors")
    report = run_image_pretraining(context)
    assert report.metrics["steps"] == 6
    named = {record.message.split()[1] for record in caplog.records if "is left out" in record.message}
    assert named and named <= {"clip-8", "clip-9", "clip-10", "clip-11"}
    again = toy_context(tmp_path, "again", toy_preset(damaged_share=0.5))
    assert run_image_pretraining(again).metrics == report.metrics


def test_too_many_damaged_samples_stop_a_training(tmp_path: Path) -> None:
    context = toy_context(tmp_path, "holes", toy_preset())
    split_shard(context.inputs["latents"])
    (context.inputs["latents"] / "shards" / "second.safetensors").unlink()
    with pytest.raises(UserError, match=r"2 of \d+ samples are damaged, which is more than 1; delete the damaged"):
        run_image_pretraining(context)


def test_nan_in_a_test_clip_is_named_before_the_first_step(tmp_path: Path) -> None:
    context = toy_context(tmp_path, "first")
    spoil(context.inputs["latents"] / "shards" / "toy.safetensors", 6)
    with pytest.raises(UserError, match=r"stopped at step 0: .*clip-6, row 6 of .*whose latents hold NaN"):
        run_image_pretraining(context)


def test_nan_that_the_training_did_not_draw_is_named(tmp_path: Path) -> None:
    few = toy_preset(phases=[{**PHASE, "frames": 1, "iterations": 1, "batch_size": 1}], validation_samples=1)
    context = toy_context(tmp_path, "few", few)
    for row in (2, 3, 4, 5):
        spoil(context.inputs["latents"] / "shards" / "toy.safetensors", row)
    with pytest.raises(UserError, match=r"the latents of clip clip-\d hold NaN .*run the stage 'latents' again"):
        run_image_pretraining(context)


def test_nan_among_unrelated_images_names_their_clips(tmp_path: Path) -> None:
    folder = toy_context(tmp_path, "first").inputs["latents"]
    spoil(folder / "shards" / "toy.safetensors", TRAINED)
    cache = LatentCache(folder)
    rows = cache.index.rows.where(pl.col("split") == "train")
    examples = Examples(cache, rows, 2, Draws(0, 0.0, 1.0, image_share=1.0))
    bad = [index for index in range(20) if examples[index]["latents"].isnan().any()]
    assert bad
    for index in bad:
        assert f"clip-{TRAINED}, row {TRAINED}" in str(explain(NotFinite([index]), examples, 1, tmp_path))


@pytest.mark.parametrize("name", ["index.parquet", "latents.json", "null_text.safetensors"])
def test_a_damaged_index_is_named(name: str, tmp_path: Path) -> None:
    folder = toy_context(tmp_path, "cut").inputs["latents"]
    truncate(folder / name)
    with pytest.raises(UserError, match=r"latents: the latent cache is damaged .*run the stage 'latents' again"):
        LatentCache(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match="run the stage 'latents'"):
        LatentCache(folder)


def test_a_checkpoint_that_cannot_be_opened_now_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step=2.ckpt"
    torch.save({"a": torch.ones(3)}, path)

    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as short, pytest.raises(OSError, match="Too many open files"):
        short.setattr(Path, "open", refuse)
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path) == path


def test_what_a_killed_writer_left_is_pruned(tmp_path: Path) -> None:
    for name in ("step=2.ckpt", "step=3.ckpt.part", "step=4.ckpt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "step=5.ckpt.part").mkdir()
    prune(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step=4.ckpt"]
