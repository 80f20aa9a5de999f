"""Which clips of which catalogues a run has used: its own training, and with it those of the models it started from."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
from pydantic import ValidationError

from flows.lineage.objects import Missing, Objects
from flows.lineage.records import Records, StageRun
from svd.catalogue.tables import read_clips, read_sources
from svd.config import Preset, TrainingConfig
from svd.core.errors import UserError
from svd.latents.cache import LatentCache
from svd.latents.index import Rows
from svd.training.frames import split_rows
from svd.training.usage import Usage, training_usage

TABLES = ("catalogue/clips.parquet", "catalogue/verdicts.parquet", "catalogue/sources.parquet")
INDEX = ("index.parquet", "latents.json", "null_text.safetensors")


class Uses:
    """The clips behind hashes and runs, read by hash from DVC; each is read once."""

    def __init__(self, records: Records, objects: Objects) -> None:
        self.records = records
        self._objects = objects
        self._catalogues: dict[str, tuple[pl.DataFrame, pl.DataFrame]] = {}
        self._used: dict[str, Usage] = {}

    def catalogue(self, md5: str) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Return clips and sources of the catalogue at `md5`; raises Missing, or UserError for another format."""
        if md5 not in self._catalogues:
            with TemporaryDirectory() as folder:
                self._objects.link(md5, Path(folder), *TABLES)
                self._catalogues[md5] = read_clips(Path(folder)), read_sources(Path(folder))
        return self._catalogues[md5]

    def cached(self, md5: str) -> frozenset[str]:
        """Return the clips of the latent cache at `md5`; raises Missing."""
        with self._cache(md5) as folder:
            return frozenset(LatentCache(Path(folder)).index.rows.column("clip_id"))

    def _cache(self, md5: str) -> TemporaryDirectory[str]:
        folder = TemporaryDirectory()
        self._objects.link(md5, Path(folder.name), *INDEX)
        return folder

    def by(self, run: StageRun) -> Usage:
        """Return what this run itself has used, without the models that it started from; raises Missing.

        Where the training can't be retraced (its preset is gone or of another version, or it has not finished), every
        clip that it could read is in `perhaps`.
        """
        if run.id not in self._used:
            self._used[run.id] = self._find(run)
        return self._used[run.id]

    def _find(self, run: StageRun) -> Usage:
        if "latents" in run.inputs:
            return self._of_training(run)
        if run.stage in ("autoencoder", "threshold-calibration") and "curation" in run.inputs:
            return self._of_autoencoder(run)
        return Usage()

    def _of_training(self, run: StageRun) -> Usage:
        with self._cache(run.inputs["latents"]) as folder:
            cache = LatentCache(Path(folder))
            values = self.records.preset(run)
            try:
                preset = Preset.model_validate(values)
                if run.status == "FINISHED" and isinstance(
                    getattr(preset, run.stage.replace("-", "_"), None), TrainingConfig
                ):
                    return training_usage(cache, preset, run.stage)
            except (ValidationError, UserError):
                pass
            return _split(cache.index.rows)

    def _of_autoencoder(self, run: StageRun) -> Usage:
        """It draws frames of kept clips at random: which ones is not retraced."""
        with TemporaryDirectory() as folder:
            self._objects.link(run.inputs["curation"], Path(folder), *TABLES)
            try:
                training, held_out = split_rows(Path(folder))
            except UserError:  # the curation kept nothing
                return Usage()
        perhaps = frozenset(row["clip_id"] for row in training)
        return Usage(perhaps=perhaps, validated=frozenset(row["clip_id"] for row in held_out) - perhaps)

    def through(self, run: StageRun) -> tuple[Usage, list[str]]:
        """Return what `run` and everything that it was made from have used, and hashes that are nowhere."""
        whole, lost = Usage(), list[str]()
        for one in self.records.chain(run):
            try:
                whole |= self.by(one)
            except Missing as error:
                lost.append(error.md5)
        return whole, list(dict.fromkeys(lost))


def _split(rows: Rows) -> Usage:
    train = frozenset(rows.where(pl.col("split") == "train").column("clip_id"))
    return Usage(perhaps=train, validated=frozenset(rows.column("clip_id")) - train)
