"""Makes the helpers of this folder importable from every test: pytest puts the folder of a conftest.py on the path."""

import multiprocessing

import pytest
from s3_fixtures import bucket, impatient, s3_server, small_parts

from svd.curation.scoring import process as networks

__all__ = ["bucket", "impatient", "s3_server", "small_parts"]


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
