"""One run of the curation stage in a process that a test can kill: curate_once.py SOURCES ENCODERS FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from curation_inputs import context, tiny

from svd.curation import stage

if __name__ == "__main__":
    sources, encoders, folder = map(Path, sys.argv[1:])
    stage.run(context(tiny(), sources, encoders, folder))
