"""A small curation output with rendered clips, for tests that train on pixels."""

from __future__ import annotations

from pathlib import Path

from svd.catalogue.schema import CLIPS_SCHEMA
from svd.catalogue.shards import ShardWriter
from svd.catalogue.tables import write_table_rows
from svd.media.video import write_mp4
from svd.synthetic.scenes import World, render_clip


def write_curation(folder: Path, train: int, test: int, frames: int = 8, height: int = 32, width: int = 48) -> Path:
    """Clips of both splits in shards, with their catalogue; everything kept."""
    rows = []
    with ShardWriter(folder / "shards", 10_000_000) as shards:
        for split, count in (("train", train), ("test", test)):
            world = World(0, split)
            for index in range(count):
                path = folder / "clip.mp4"
                write_mp4(path, render_clip(world, index, frames, height, width, 8).frames, 8)
                clip_id = f"{split}-{index:03d}"
                member = shards.add(clip_id, {"mp4": path})["mp4"]
                path.unlink()
                rows.append(
                    dict.fromkeys(CLIPS_SCHEMA.names)
                    | {
                        "clip_id": clip_id,
                        "source_uri": f"{split}/{index}.mp4",
                        "split": split,
                        "frames": frames,
                        "fps": 8.0,
                        "width": width,
                        "height": height,
                        "shard": member.shard,
                        "offset": member.offset,
                        "size": member.size,
                        "keep": True,
                        "verdict": "keep",
                    }
                )
    target = folder / "catalogue" / "clips.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_table_rows(target, rows, CLIPS_SCHEMA)
    return folder
