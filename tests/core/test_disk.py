"""A full disk is one line that names the folder, whichever library met it; other errors are left alone."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

import pytest
import torch

from svd.core.disk import full_disk_in_one_line
from svd.core.errors import UserError

FULL = Path("/dev/full")  # the kernel refuses every write to it with ENOSPC


def write_plainly() -> None:
    with FULL.open("wb", buffering=0) as stream:
        stream.write(b"x")


def save_weights() -> None:
    torch.save({"weights": torch.zeros(1_000_000)}, FULL)


def fill_database() -> None:
    raise sqlite3.OperationalError("database or disk is full")


def fail_behind_another_error() -> None:
    try:
        write_plainly()
    except OSError as error:
        raise RuntimeError("the unit failed") from error


@pytest.mark.skipif(not FULL.is_char_device(), reason="needs /dev/full")
@pytest.mark.parametrize("fail", [write_plainly, save_weights, fill_database, fail_behind_another_error])
def test_a_full_disk_is_told_with_its_folder(fail: object, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"^the disk of .* is full \([\d,]+ of [\d,]+ MB are free\); make room"),
        full_disk_in_one_line(tmp_path / "work" / "not yet there"),
    ):
        fail()  # type: ignore[operator]


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), ValueError("wrong"), UserError("mine")])
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, full_disk_in_one_line(tmp_path):
        raise error
    assert raised.value is error
