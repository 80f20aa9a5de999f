"""The networks of curation in a process of their own: CLIP, captioners, aesthetics and NSFW heads (§3.1, App. C).

torch and the networks need more memory than everything else of curation together. Beside the run they are loaded once
for all units and gone with it, and the processes that grow with what is curated stay small.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from svd.config import CurationConfig, EncodersConfig
from svd.core.device import pick_device
from svd.core.errors import UserError
from svd.curation.base.child_process import end_with_parent, exit_name

if TYPE_CHECKING:
    from svd.curation.scoring.unit import ClipScorer

START_METHOD = "spawn"  # CUDA does not survive a fork
PATIENCE = 5.0  # seconds


class ScoringProcess:
    """A child process that scores units, loaded as soon as this is made; raises UserError for missing weights.

    It ends when this process does, however this process ends.
    """

    def __init__(self, config: CurationConfig, encoders: EncodersConfig, folder: Path) -> None:
        context = multiprocessing.get_context(START_METHOD)
        self._connection, theirs = context.Pipe()
        # mypy: the classes of the start methods have no common one with Process.
        self._process = context.Process(target=_serve, args=(theirs, config, encoders, folder), daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def score_unit(self, measured: Path, folder: Path, shard_bytes: int) -> None:
        """As ClipScorer.score_unit; what it raises is raised here. Raises UserError when the process has died."""
        with contextlib.suppress(BrokenPipeError):  # the answer says how it ended
            self._connection.send((measured, folder, shard_bytes))
        self._answer()

    def _answer(self) -> None:
        try:
            error = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(PATIENCE)
            raise UserError(
                f"the process with curation's networks ended with {exit_name(self._process.exitcode)} (SIGKILL: "
                "probably the machine ran out of memory); run the stage again, it goes on where it was"
            ) from None
        if error is not None:
            raise error

    def close(self) -> None:
        """End the child process; what it is at work on is lost."""
        with contextlib.suppress(BrokenPipeError):
            self._connection.send(None)
        self._process.join(PATIENCE)  # one that is idle ends by itself, and tidies up
        self._process.kill()
        self._process.join()
        self._process.close()
        self._connection.close()


def _serve(connection: Connection, config: CurationConfig, encoders: EncodersConfig, folder: Path) -> None:
    """Child: load everything, then score units until it is sent None; says None after each, or the error."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        scorer = _load(config, encoders, folder)
        connection.send(None)
        while request := connection.recv():
            scorer.score_unit(*request)
            connection.send(None)
    except EOFError:
        return
    except Exception as error:
        error.add_note(traceback.format_exc())  # a traceback itself can't be sent
        connection.send(error)


def _load(config: CurationConfig, encoders: EncodersConfig, folder: Path) -> ClipScorer:
    """Load the networks that the preset names; raises UserError for missing weights."""
    from svd.curation.captions.registry import make_captioners
    from svd.curation.scoring import embeddings
    from svd.curation.scoring.unit import ClipScorer
    from svd.model.formats.encoders import load_encoders

    device = pick_device()
    head = embeddings.load_aesthetics(Path(encoders.aesthetics_weights)) if encoders.aesthetics_weights else None
    return ClipScorer(
        encoders=load_encoders(folder, encoders, device),
        captioners=make_captioners(config.captions, device),
        used=config.captions.captioners,
        head=head,
        nsfw=embeddings.load_nsfw(Path(config.nsfw_weights)) if config.nsfw_weights else None,
        device=device,
    )
