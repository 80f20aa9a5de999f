"""The process of curation's networks: what it can't load, what ends it, what stays out of the run's own process."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
from curation_inputs import context, tiny, write_encoders, write_sources

from svd.core.errors import UserError
from svd.curation.scoring import process as networks_module
from svd.curation.scoring.process import ScoringProcess


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("networks") / "encoders")


def networks(encoders, **overrides) -> closing[ScoringProcess]:
    preset = tiny(**overrides)
    return closing(ScoringProcess(preset.curation, preset.encoders, encoders))


def test_missing_weights_are_told_at_once(encoders, tmp_path):
    with pytest.raises(UserError, match=r"encoders\.aesthetics_weights: '.*head\.pth' does not exist"):
        networks(encoders, encoders__aesthetics_weights=str(tmp_path / "head.pth"))
    with pytest.raises(UserError, match="needs video_model"):
        networks(encoders, curation__captions__captioners=["video"])


def test_a_killed_process_is_one_clear_line(encoders, tmp_path):
    with networks(encoders) as alive:
        alive._process.kill()
        with pytest.raises(UserError, match=r"ended with SIGKILL .* run the stage again"):
            alive.score_unit(tmp_path / "clips-000000", tmp_path, 1)


def test_an_unexpected_error_says_where_it_happened(encoders, tmp_path):
    with networks(encoders) as alive, pytest.raises(FileNotFoundError) as caught:
        alive.score_unit(tmp_path / "clips-000000", tmp_path / "scored", 1)
    assert "in score_unit" in "".join(caught.value.__notes__)


def hold(encoders: Path, connection: Connection) -> None:
    """A run that has its networks, and does nothing with them."""
    networks_module.START_METHOD = "fork"
    with networks(encoders) as alive:
        connection.send(alive._process.pid)
        connection.recv()


def test_it_ends_with_its_run(encoders):
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    run = context.Process(target=hold, args=(encoders, theirs))
    run.start()
    child = psutil.Process(ours.recv())
    assert child.is_running()
    run.kill()
    run.join()
    child.wait(timeout=30)


def test_torch_stays_out_of_the_runs_own_process(encoders, tmp_path):
    sources = write_sources(tmp_path / "sources", train=1, scenes=2)
    run = context(tiny(), sources, encoders, tmp_path)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from svd.curation import stage\n"
        "from svd.config.load import load_preset\n"
        "from svd.stage import StageContext\n"
        "if __name__ == '__main__':\n"
        "    folders = [Path(name) for name in sys.argv[1:]]\n"
        "    inputs = {'sources': folders[0], 'encoders': folders[1]}\n"
        "    stage.run(StageContext(load_preset('tiny'), inputs, folders[2], folders[3]))\n"
        "    print({'torch', 'open_clip', 'onnxruntime', 'transformers'} & sys.modules.keys())\n"
    )
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, tmp_path / "program.py", sources, encoders, run.output, run.work]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert (run.output / "catalogue" / "clips.parquet").is_file()
