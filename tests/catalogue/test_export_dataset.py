"""`svd export dataset`: every form, read by other means, has the clips byte for byte; a failure leaves nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from catalogue_inputs import write_catalogue
from typer.testing import CliRunner
from web_server import serving

from flows.cli.app import app
from flows.recording import results_store
from svd.catalogue import schema, tables
from svd.catalogue.export.dataset import export_dataset
from svd.catalogue.export.selection import Selection
from svd.catalogue.filters import write_verdicts
from svd.catalogue.subsets import write_subsets
from svd.config import FiltersConfig
from svd.core.errors import UserError

FILTERS = {"min_motion": {"absolute": 0.35}}
HELD_OUT = 0.5
Samples = dict[str, dict[str, tuple[bytes, dict, str | None]]]  # by split and clip: mp4, columns, caption


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> Path:
    """Twelve clips of four sources, two of which are held out; every clip's bytes are its own."""
    folder = write_catalogue(tmp_path_factory.mktemp("outputs") / "mine" / "curation", config=FILTERS)
    clips = pl.read_parquet(tables.clips_path(folder))
    shard = folder / "shards" / clips["shard"][0]
    data = bytearray(shard.read_bytes())
    for number, (offset, size) in enumerate(clips.select("offset", "size").rows()):
        data[offset + size - 4 : offset + size] = number.to_bytes(4, "big")
    shard.write_bytes(data)
    ids = pl.Series([f"{'07cf'[number // 3]}{number // 3:031x}" for number in range(12)])
    captions = [
        None if n == 11 else [{"captioner": "coca", "text": f"coca {n}"}, {"captioner": "llm", "text": f"Häuser {n}"}]
        for n in range(12)
    ]
    clips = clips.with_columns(ids.alias("source_id"), pl.lit("CC0").alias("licence")).drop("captions")
    clips = clips.with_columns(pl.Series("captions", captions))
    tables.write_table(tables.clips_path(folder), tables.with_schema(clips, schema.SCORES_SCHEMA))
    write_subsets(folder, {"still": FiltersConfig.model_validate({"max_motion": {"absolute": 0.45}})})
    return folder


def read_webdataset(folder: Path) -> Samples:
    """As webdataset groups: by the part of the name before its first dot."""
    found: Samples = {}
    for path in sorted(folder.glob("*.tar")):
        files: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                files.setdefault(key, {})[extension] = tar.extractfile(member).read()
        for key, sample in files.items():
            text = sample["txt"].decode() if "txt" in sample else None
            found.setdefault(path.name.split("-")[0], {})[key] = (sample["mp4"], json.loads(sample["json"]), text)
    return found


def read_folder(folder: Path) -> Samples:
    found: Samples = {}
    for path in sorted(folder.rglob("*.mp4")):
        text = path.with_suffix(".txt")
        sample = path.read_bytes(), json.loads(path.with_suffix(".json").read_text()), None
        sample = (*sample[:2], text.read_text() if text.exists() else None)
        found.setdefault(path.relative_to(folder).parts[0], {})[path.stem] = sample
    return found


def read_videofolder(folder: Path) -> Samples:
    """As documented: a table per split, whose `file_name` is the way from the table to the video."""
    found: Samples = {}
    for path in sorted(folder.glob("*/metadata.parquet")):
        table = pq.read_table(path)
        assert table.column_names[:2] == ["file_name", "caption"]
        rows = {Path(row["file_name"]).stem: row for row in table.to_pylist()}
        found[path.parent.name] = {
            name: ((path.parent / row.pop("file_name")).read_bytes(), row, row["caption"]) for name, row in rows.items()
        }
        assert len(list(path.parent.rglob("*.mp4"))) == len(rows)
    return found


READERS = {"webdataset": read_webdataset, "datasets": read_videofolder, "folder": read_folder}


@pytest.mark.parametrize("form", READERS)
def test_every_form_has_the_kept_clips_byte_for_byte(catalogue, tmp_path, form):
    seen = list[tuple[int, int]]()
    about = export_dataset(
        catalogue,
        lambda relative: catalogue / relative,
        tmp_path / "set",
        form,
        Selection(hold_out=HELD_OUT),
        "llm",
        shard_bytes=20_000,
        advance=lambda *numbers: seen.append(numbers),
    )
    found = READERS[form](tmp_path / "set")
    kept = tables.read_clips(catalogue).filter("keep")
    assert {split: set(clips) for split, clips in found.items()} == {
        "test": {row["clip_id"] for row in kept.to_dicts() if row["source_id"][0] in "07"},
        "train": {row["clip_id"] for row in kept.to_dicts() if row["source_id"][0] in "cf"},
    }
    assert seen == [(number, 8) for number in range(1, 9)]
    for row in kept.iter_rows(named=True):
        mp4, columns, caption = next(clips[row["clip_id"]] for clips in found.values() if row["clip_id"] in clips)
        shard = (catalogue / "shards" / row["shard"]).read_bytes()
        assert mp4 == shard[row["offset"] : row["offset"] + row["size"]]
        assert caption == columns["caption"] == (row["captions"][1]["text"] if row["captions"] else None)
        for name in ("source_uri", "licence", "motion_score", "captions", "verdict", "source_id", "aesthetics"):
            assert columns[name] == row[name]
        assert not {"shard", "offset", "size", "keep"} & set(columns)
    assert about == json.loads((tmp_path / "set" / "export.json").read_text())
    assert about["clips"] == {"test": 2, "train": 6} and about["licences"] == {"CC0": 8}
    assert about["bytes"] == kept["size"].sum()
    if form == "webdataset":
        names = sorted(path.name for path in (tmp_path / "set").glob("train*"))
        assert len(names) > 1 and names == [f"train-{number:06d}.tar" for number in range(len(names))]


def test_subsets_verdicts_and_the_catalogues_own_split(catalogue, tmp_path):
    def chosen(**selection) -> dict[str, int]:
        name = tmp_path / str(len(list(tmp_path.iterdir())))
        return export_dataset(catalogue, lambda one: catalogue / one, name, "folder", Selection(**selection))["clips"]

    assert chosen(subset="still") == {"train": 5}
    assert chosen(verdicts=["motion"]) == {"train": 4}
    assert chosen(verdicts=["motion", "kept"], hold_out=1) == {"test": 12}
    assert read_folder(tmp_path / "0")["train"]["clip00"][2] == "coca 0"


def test_a_failure_leaves_nothing(catalogue, tmp_path):
    def fail(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    for form in READERS:
        with pytest.raises(KeyboardInterrupt):
            export_dataset(catalogue, lambda one: catalogue / one, tmp_path / "set", form, Selection(), advance=fail)
    assert list(tmp_path.iterdir()) == []


def export(*arguments: object, **environment: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["export", "dataset", *map(str, arguments)], env=environment)
    return result.exit_code, str(result.exception) if isinstance(result.exception, UserError) else result.output


def test_mistakes_are_one_line(catalogue, tmp_path):
    (tmp_path / "there").mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(catalogue, broken)
    (shard,) = (broken / "shards").iterdir()
    shard.write_bytes(shard.read_bytes()[:20_000])
    nothing = tmp_path / "nothing"
    shutil.copytree(catalogue, nothing)
    write_verdicts(nothing, FiltersConfig.model_validate({"min_motion": {"absolute": 9}}))
    for arguments, message in (
        ((tmp_path, tmp_path / "x"), "no clip catalogue here"),
        ((catalogue, tmp_path / "there"), "exists already"),
        ((catalogue, tmp_path / "x", "--verdict", "blur"), "no clip has the verdict 'blur'; there are: kept, motion"),
        ((catalogue, tmp_path / "x", "--subset", "best"), "no subset 'best'; there are: still"),
        ((catalogue, tmp_path / "x", "--subset", "still", "--verdict", "kept"), "not both"),
        ((nothing, tmp_path / "x"), "has no clips; loosen"),
        ((broken, tmp_path / "x"), "ends before the clip"),
    ):
        code, output = export(*arguments)
        assert code == 1 and message in output and "\n" not in output, output
        assert not (tmp_path / "x").exists()
    shard.unlink()
    assert "missing, though the catalogue names it" in export(broken, tmp_path / "x")[1]


def test_from_an_address_come_the_tables_and_the_chosen_clips_alone(catalogue, tmp_path):
    with serving(catalogue) as (address, sent):
        code, output = export(address, tmp_path / "set", "--to", "folder", "--verdict", "motion", SVD_NO_PROGRESS="1")
        assert code == 0, output
        found = read_folder(tmp_path / "set")["train"]
        tables_size = sum(path.stat().st_size for path in (catalogue / "catalogue").iterdir())
        assert len(found) == 4 and sum(sent) <= tables_size + sum(len(clip) for clip, *_ in found.values()) + 4096
        assert "no clip catalogue there" in export(f"{address}/elsewhere", tmp_path / "other")[1]


def test_a_catalogue_in_a_store_is_read_by_hash(catalogue, tmp_path, monkeypatch):
    """The layout of DVC's remote; `stored_output` and `stored_files` have tests of their own."""
    files = []
    for path in sorted(path for path in catalogue.rglob("*") if path.is_file()):
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        files.append({"relpath": path.relative_to(catalogue).as_posix(), "md5": md5})
        target = tmp_path / "store" / "dvc" / "files" / "md5" / md5[:2] / md5[2:]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    monkeypatch.setattr(results_store, "stored_output", lambda root, preset, stage: (preset, stage))
    monkeypatch.setattr(results_store, "stored_files", lambda root, output: files)
    arguments = ("outputs/mine/curation", tmp_path / "set", "--to", "folder", "--store", tmp_path / "store")
    assert export(*arguments) == (0, f"{tmp_path / 'set'}: 8 train, 0.0 MB\n")
    kept = tables.read_clips(catalogue).filter("keep")["clip_id"].to_list()
    assert sorted(read_folder(tmp_path / "set")["train"]) == kept
    monkeypatch.setattr(results_store, "stored_output", lambda root, preset, stage: None)
    assert "has no outputs/mine/curation" in export(*arguments[:1], tmp_path / "other", *arguments[4:])[1]
