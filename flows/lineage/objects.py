"""Files of a DVC folder at a hash, without touching the working folder: from DVC's cache, else from a remote.

Only the files that are asked for travel; what was fetched stays in the cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc_data.hashfile.hash import file_md5
from dvc_objects.fs.local import LocalFileSystem

from flows.recording import dvc as versioning
from flows.recording.results_store import store_root
from svd.core.errors import UserError
from svd.core.files import atomic_file
from svd.core.retries import Unreachable


class Missing(UserError):
    """An object that is neither in DVC's cache nor in a remote; `md5` is its hash."""

    def __init__(self, md5: str) -> None:
        super().__init__(f"{md5} is neither in DVC's cache nor in a remote; `dvc push` it where it was made")
        self.md5 = md5


class Objects:
    """The objects that this machine can reach by their hashes."""

    def __init__(self, repo: Repo, store: str | None) -> None:
        self.cache = Path(repo.cache.local.path)
        self._remotes = _remotes(repo, store)

    def path(self, md5: str) -> Path:
        """Return the path of an object in DVC's cache; raises Missing, or Unreachable when a remote doesn't answer."""
        path = self.cache / md5[:2] / md5[2:]
        if not path.is_file():
            self._fetch(md5, path)
        return path

    def _fetch(self, md5: str, path: Path) -> None:
        for remote in self._remotes:
            try:
                with atomic_file(path) as temporary:
                    remote.fs.get_file(remote.oid_to_path(md5), str(temporary))
                    if file_md5(str(temporary), LocalFileSystem()) == md5.removesuffix(".dir"):
                        temporary.chmod(0o444)
                        return
                    raise FileNotFoundError(f"{md5} is damaged there")
            except FileNotFoundError:
                continue
            except (OSError, BotoCoreError, ClientError) as error:
                raise Unreachable(f"the DVC remote {remote.path} does not answer: {error}") from None
        raise Missing(md5)

    def tree(self, md5: str) -> dict[str, str]:
        """Return the hash of each file of the folder `md5` by its relative path; raises Missing."""
        path = self.path(md5)
        try:
            return {entry["relpath"]: entry["md5"] for entry in json.loads(path.read_text())}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: damaged, not a list of a folder; delete it, and it is fetched again") from None

    def link(self, md5: str, folder: Path, *names: str) -> None:
        """Make `folder` hold the files `names` of the DVC folder `md5`, those of them that it has; raises Missing."""
        files = self.tree(md5)
        for name in filter(files.__contains__, names):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(self.path(files[name]).absolute())


@contextmanager
def open_objects(store: str | None = None) -> Iterator[Objects]:
    """Open the objects of the project in this folder; store: default SVD_STORE, looked into before DVC's remote."""
    with versioning.open_repo() as repo:
        yield Objects(repo, store_root(store))


def _remotes(repo: Repo, store: str | None) -> list[Any]:
    """Return the object databases of the store and of the user's default remote."""
    names = [repo.config["core"].get("remote")]
    if store:
        # of this object, not of the files
        repo.config["remote"][versioning.STORE_REMOTE] = versioning.store_remote(store)
        names = [versioning.STORE_REMOTE, *names]
    try:
        return [repo.cloud.get_remote_odb(name) for name in dict.fromkeys(names) if name]
    except DvcException as error:
        raise UserError(f"{os.path.curdir}: the DVC remote can't be used ({error})") from None
