"""Fetch published weights from a hub: resumable, checked against hashes, and never a pickle.

The transfer is our own: a killed download goes on where it stopped, which the hub's library doesn't do.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from svd.core.environment import cache_folder
from svd.core.errors import UserError
from svd.core.files import replace_file, write_json
from svd.model.formats.diffusers_configs import read_config
from svd.model.safetensors import PICKLES, check_hash, read_header, some

WANTED = (".safetensors", ".json", ".txt", ".model")
FETCHED = "fetched.json"
UNET_FILES = ("unet/config.json", "unet/diffusion_pytorch_model.safetensors")
VAE_FILES = ("vae/config.json", "vae/diffusion_pytorch_model.safetensors")
ATTEMPTS = 6
BACKOFF = 1.0  # seconds before the second attempt; doubles with each


@dataclass(frozen=True)
class Repository:
    """A repository on a hub. revision: as the user named it. commit: what that meant at the first answer; None
    before it, and for hubs that don't say.
    """

    id: str
    revision: str
    token: str | None
    endpoint: str | None
    commit: str | None = None


@dataclass(frozen=True)
class Remote:
    """A file on a hub: its address there, `key` (names its version; the SHA-256 of large files), size in bytes.

    The hub redirects to signed addresses on other hosts. They expire, so every attempt begins at the hub; and they must
    not see the token, which httpx leaves out when a redirect goes to another origin.
    """

    url: str
    key: str
    size: int
    token: str | None
    commit: str | None

    @property
    def sha256(self) -> str | None:
        """Return the hash that the hub states, None where it doesn't."""
        return self.key if re.fullmatch(r"[0-9a-f]{64}", self.key) else None


def fetch_repository(
    repo_id: str,
    target: Path,
    *,
    filenames: Sequence[str] | None = None,
    include: Sequence[str] | None = None,
    revision: str = "main",
    token: str | None = None,
    sha256: Mapping[str, str] | None = None,
    resume: bool = True,
    endpoint: str | None = None,
) -> list[Path]:
    """Download files of a hub repository into `target`; return their paths.

    All files come from one commit, whatever is pushed meanwhile: the one that `revision` is at the beginning. It is
    kept for every file in `target/fetched.json`. filenames: exact names. include: glob patterns (`*` takes `/`, too),
    which choose among the safetensors, JSON and text files; without names and patterns these are taken all. sha256:
    expected hash by file name; a safetensors file is always checked for being complete. token: for gated repositories
    (or the environment's HF_TOKEN). resume: go on with a broken download; False starts afresh. endpoint: another hub
    (or the environment's HF_ENDPOINT).
    Raises UserError, in one line, for an unknown repository, revision or file, a pattern without files, missing
    rights, no network, pickled files, a file cut short and a wrong hash.
    """
    repository = Repository(repo_id, revision, token, endpoint or os.environ.get("HF_ENDPOINT") or None)
    names = list(filenames or [])
    for name in names:
        if Path(name).suffix in PICKLES:
            raise UserError(
                f"{repo_id}/{name}: pickled checkpoints can run code and are refused; name a .safetensors file"
            )
    if include or filenames is None:
        listed, repository = _list(repository)
        names += [name for name in _chosen(listed, include or ["*"], repo_id) if name not in names]
    paths = []
    for name in names:
        path, remote = _download(repository, name, target, resume)
        repository = replace(repository, commit=repository.commit or remote.commit)
        _check(path, remote, (sha256 or {}).get(name))
        _record(target, repository, name)
        paths.append(path)
    return paths


def _list(repository: Repository) -> tuple[list[str], Repository]:
    """Return the names that may be taken, and the repository with its commit."""
    try:
        api = HfApi(endpoint=repository.endpoint, token=repository.token)
        info = api.model_info(repository.id, revision=repository.revision)
    except Exception as error:
        raise _explain(error, repository.id, repository) from None
    wanted = sorted(file.rfilename for file in info.siblings or [] if file.rfilename.endswith(WANTED))
    return wanted, replace(repository, commit=info.sha)


def _chosen(names: Sequence[str], patterns: Sequence[str], repo_id: str) -> list[str]:
    """Return the names that fit a pattern; raise UserError when one fits none, and without any safetensors file."""
    if not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{repo_id}: this repository has no .safetensors file")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"{repo_id}: no safetensors, JSON or text file fits '{pattern}'; it has {some(names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _record(target: Path, repository: Repository, name: str) -> None:
    """Record the commit of a file, beside those of earlier calls."""
    value = {"repository": repository.id, "commit": repository.commit}
    write_json(target / FETCHED, recorded(target) | {name: value})


def recorded(folder: Path) -> dict[str, dict[str, str | None]]:
    """Return the `repository` and `commit` of every file that was fetched into a folder."""
    path = folder / FETCHED
    return read_config(path) if path.is_file() else {}


def _download(repository: Repository, name: str, target: Path, resume: bool) -> tuple[Path, Remote]:
    path, token, endpoint = target / name, repository.token, repository.endpoint

    def url(revision: str) -> str:
        return hf_hub_url(repository.id, name, revision=revision, endpoint=endpoint)

    try:
        asked = repository.commit or repository.revision
        meta = get_hf_file_metadata(url(asked), token=token, endpoint=endpoint)
        address = url(repository.commit or meta.commit_hash or asked)
        remote = Remote(address, meta.etag or "unknown", meta.size or 0, token, meta.commit_hash)
        if not (resume and path.is_file() and _may_be(path, remote)):
            path.parent.mkdir(parents=True, exist_ok=True)
            _retried(remote, path, resume)
    except Exception as error:
        raise _explain(error, f"{repository.id}/{name}", repository) from None
    return path, remote


def _may_be(path: Path, remote: Remote) -> bool:
    """Return whether a local file has the size and, where the hub states it (small files), git's hash."""
    if path.stat().st_size != remote.size:
        return False
    if not re.fullmatch(r"[0-9a-f]{40}", remote.key):
        return True
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == remote.key


def _retried(remote: Remote, path: Path, resume: bool) -> None:
    """Download with backoff; the next attempt continues what a broken one (or a killed process) has got."""
    part = path.with_name(f".{path.name}.{remote.key[:16]}.part")
    if not resume:
        part.unlink(missing_ok=True)
    for attempt in range(ATTEMPTS):
        try:
            _stream(remote, part)
            break
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            final = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
            if final or attempt == ATTEMPTS - 1:
                raise
            time.sleep(min(2**attempt, 30) * BACKOFF)
    replace_file(part, path)


def _stream(remote: Remote, part: Path) -> None:
    """Append the missing bytes to `part`."""
    have = part.stat().st_size if part.is_file() else 0
    if remote.size and have >= remote.size:
        return
    headers = build_hf_headers(token=remote.token) | {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with httpx.stream("GET", remote.url, headers=headers, follow_redirects=True, timeout=60) as response:
        response.raise_for_status()
        if response.status_code != 206:  # the server gives the whole file whatever was asked for
            have = 0
        with (
            part.open("ab" if have else "wb") as stream,
            tqdm(total=remote.size or None, initial=have, unit="B", unit_scale=True, desc=part.name[1:25]) as bar,
        ):
            for block in response.iter_raw():
                stream.write(block)
                bar.update(len(block))


def _check(path: Path, remote: Remote, sha256: str | None) -> None:
    """Refuse, and delete, a file that is cut short or has another hash than given or than the hub states."""
    try:
        if remote.size and path.stat().st_size != remote.size:
            raise UserError(f"{path}: cut short: {path.stat().st_size} bytes instead of {remote.size}")
        if path.suffix == ".safetensors":
            read_header(path)
        if expected := sha256 or remote.sha256:
            check_hash(path, expected)
    except UserError:
        # A bad file must not be taken for a good one by the next call.
        path.unlink()
        raise


def _explain(error: Exception, what: str, repository: Repository) -> Exception:
    """Turn an error of the hub or the network into a UserError of one line; return any other error as it is."""
    hub, revision = repository.endpoint or "the hub", repository.revision
    if isinstance(error, GatedRepoError):
        return UserError(f"{what}: gated; accept its licence on {hub} and give a token (--token or HF_TOKEN)")
    if isinstance(error, RepositoryNotFoundError):
        return UserError(f"{what}: no such repository on {hub}, or it's private and the token is missing or wrong")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{what}: no revision '{revision}' in this repository")
    if isinstance(error, HFValidationError):
        return UserError(f"{what}: not a repository name; expected owner/name")
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(f"{what}: offline mode is on (HF_HUB_OFFLINE); unset it, or give a local path")
    if isinstance(error, LocalEntryNotFoundError) or _is_of_the_network(error):
        return UserError(f"{what}: {hub} can't be reached; check the network, or give a local path")
    if isinstance(error, EntryNotFoundError):
        return UserError(f"{what}: no such file in this repository (revision '{revision}')")
    if isinstance(error, HfHubHTTPError | httpx.HTTPStatusError):
        return UserError(f"{what}: {hub} answered: {str(error).splitlines()[0]}")
    return error


def _is_of_the_network(error: Exception) -> bool:
    """Decide by class name: the hub's library has moved between three HTTP clients with errors of their own."""
    return bool({"TransportError", "ConnectionError"} & {kind.__name__ for kind in type(error).__mro__})


def resolve_weights(name: str, filenames: Sequence[str] | None = None) -> Path:
    """Return a local path for weights: `name` itself, or the folder of this repository of the hub, fetched if needed.

    Repositories are kept in `cache_folder()`, each at the commit that was `main` when it was
    first asked for: nothing changes between the stages of a run, and what is there needs no network. Raises UserError
    when it's neither.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.count("/") != 1 or name.startswith((".", "~", "/")) or path.suffix == ".safetensors":
        raise UserError(f"{name}: no such file or folder, and not a hub repository (owner/name)")
    folder = cache_folder() / name.replace("/", "--")
    record = recorded(folder)
    if filenames and all(file in record and (folder / file).is_file() for file in filenames):
        return folder
    commit = next((entry["commit"] for entry in record.values()), None)
    fetch_repository(name, folder, filenames=filenames, revision=commit or "main")
    return folder
