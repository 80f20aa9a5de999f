"""Makes the helpers of this folder importable from every test: pytest puts the folder of a conftest.py on the path."""

import multiprocessing
import time

import pytest
from s3_fixtures import bucket, impatient, s3_server, small_parts

from svd.curation.scoring import process as networks

__all__ = ["bucket", "impatient", "s3_server", "small_parts"]
BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--budget`, for a check that must end in time on any machine."""
    parser.addoption(
        "--budget", type=float, metavar="SECONDS", help="begin no test after so many seconds, skip the rest"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that would begin too late, before its fixtures are made."""
    budget = item.config.getoption("budget")
    if budget is not None and time.monotonic() - BEGAN > budget:
        pytest.skip(f"NOT RUN: the {budget:.0f} s of --budget are over")


@pytest.fixture(scope="session", autouse=True)
def networks_are_forked() -> None:
    """torch and open_clip are imported once for the networks of curation, not for each of many runs."""
    preloaded = [
        "svd.curation.stage",
        "svd.curation.scoring.unit",
        "svd.curation.captions.registry",
        "svd.model.encoders",
    ]
    multiprocessing.set_forkserver_preload(preloaded)
    networks.START_METHOD = "forkserver"
