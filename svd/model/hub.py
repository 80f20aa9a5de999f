"""Fetching published weights from a hub: resumable, checked against hashes, and never a pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
from huggingface_hub import HfApi, hf_hub_download
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

from svd.model.checkpoint import PICKLES, check_hash, read_header
from svd.stage import UserError

WANTED = (".safetensors", ".json", ".txt", ".model")
CACHE = "SVD_CACHE"


def fetch(
    repo_id: str,
    target: Path,
    *,
    filenames: Sequence[str] | None = None,
    revision: str = "main",
    token: str | None = None,
    sha256: Mapping[str, str] | None = None,
    resume: bool = True,
    endpoint: str | None = None,
) -> list[Path]:
    """Download files of a hub repository into `target`; gives their paths.

    filenames: None takes every safetensors, JSON and text file. sha256: expected hash by file name; a safetensors file
    is always checked for being complete. token: for gated repositories (or the environment's HF_TOKEN). resume: go on
    with a broken download; False starts afresh. endpoint: another hub (or the environment's HF_ENDPOINT).
    Raises UserError, in one line, for an unknown repository, revision or file, missing rights, no network, pickled
    files, a file cut short and a wrong hash.
    """
    endpoint = endpoint or os.environ.get("HF_ENDPOINT") or None
    names = list(filenames) if filenames is not None else _list(repo_id, revision, token, endpoint)
    for name in names:
        if Path(name).suffix in PICKLES:
            raise UserError(
                f"{repo_id}/{name}: pickled checkpoints can run code and are refused; name a .safetensors file"
            )
    return [_download(repo_id, name, target, revision, token, resume, endpoint, sha256 or {}) for name in names]


def _list(repo_id: str, revision: str, token: str | None, endpoint: str | None) -> list[str]:
    try:
        files = HfApi(endpoint=endpoint, token=token).list_repo_files(repo_id, revision=revision)
    except Exception as error:
        raise _explain(error, repo_id, revision, endpoint) from None
    wanted = sorted(name for name in files if name.endswith(WANTED))
    if not any(name.endswith(".safetensors") for name in wanted):
        raise UserError(f"{repo_id}: this repository has no .safetensors file")
    return wanted


def _download(
    repo_id: str,
    name: str,
    target: Path,
    revision: str,
    token: str | None,
    resume: bool,
    endpoint: str | None,
    sha256: Mapping[str, str],
) -> Path:
    try:
        path = Path(
            hf_hub_download(
                repo_id,
                name,
                revision=revision,
                token=token,
                local_dir=target,
                force_download=not resume,
                endpoint=endpoint,
            )
        )
    except Exception as error:
        raise _explain(error, f"{repo_id}/{name}", revision, endpoint) from None
    try:
        if path.suffix == ".safetensors":
            read_header(path)
        if name in sha256:
            check_hash(path, sha256[name])
    except UserError:
        # A bad file must not be taken for a good one by the next call.
        path.unlink()
        raise
    return path


def _explain(error: Exception, what: str, revision: str, endpoint: str | None) -> Exception:
    """A UserError in one line for the hub's and the network's errors; any other error is returned as it is."""
    hub = endpoint or "the hub"
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
    if isinstance(error, LocalEntryNotFoundError | httpx.TransportError | ConnectionError):
        return UserError(f"{what}: {hub} can't be reached; check the network, or give a local path")
    if isinstance(error, EntryNotFoundError):
        return UserError(f"{what}: no such file in this repository (revision '{revision}')")
    if isinstance(error, HfHubHTTPError):
        return UserError(f"{what}: {hub} answered: {str(error).splitlines()[0]}")
    return error


def resolve(name: str, filenames: Sequence[str] | None = None) -> Path:
    """A local path for weights that a preset names: the path itself, or a hub repository's folder, fetched when needed.

    Repositories are kept under `$SVD_CACHE` (by default `~/.cache/svd`). Raises UserError when it's neither.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.count("/") != 1 or name.startswith((".", "~", "/")) or path.suffix == ".safetensors":
        raise UserError(f"{name}: no such file or folder, and not a hub repository (owner/name)")
    folder = Path(os.environ.get(CACHE, "~/.cache/svd")).expanduser() / name.replace("/", "--")
    fetch(name, folder, filenames=filenames)
    return folder
