"""DVC-tracked folders as MLflow datasets: the digest is DVC's hash, the source says where it can be pulled from."""

from __future__ import annotations

from typing import Any

from mlflow.data.dataset_source import DatasetSource
from mlflow.data.meta_dataset import MetaDataset


class DvcSource(DatasetSource):
    """A path of this repository at a DVC hash; `dvc pull <path>` at the run's git commit brings it."""

    def __init__(self, path: str, md5: str, size: int | None = None, files: int | None = None) -> None:
        self._values = {"path": path, "md5": md5, "size": size, "files": files}

    @staticmethod
    def _get_source_type() -> str:
        return "dvc"

    def load(self) -> str:
        """Return the local path of the data, which is there after `dvc pull`."""
        return str(self._values["path"])

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        return False

    @classmethod
    def _resolve(cls, raw_source: Any) -> DvcSource:
        return cls(str(raw_source), "")

    def to_dict(self) -> dict[str, Any]:
        """Return what MLflow stores."""
        return self._values

    @classmethod
    def from_dict(cls, source_dict: dict[Any, Any]) -> DvcSource:
        """Return the source that `to_dict` described."""
        return cls(**source_dict)


def dvc_dataset(name: str, path: str, md5: str, size: int | None = None, files: int | None = None) -> MetaDataset:
    """Return an MLflow dataset whose digest is the DVC hash `md5` (36 characters at most)."""
    return MetaDataset(DvcSource(path, md5, size, files), name=name, digest=md5)
