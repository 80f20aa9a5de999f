"""The scoring process: CLIP, captioners, aesthetics and NSFW heads in a child process (§3.1, App. C).

torch and the networks need more memory than everything else of curation together. In a process of their own they are
loaded once for all units and gone with it, and the processes that decode stay small.
"""

from __future__ import annotations

import contextlib
import functools
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
from svd.curation.base.child_process import end_with_parent, exit_name, receive
from svd.curation.base.messages import Done, Raised, Ready, ScoreUnit, Stop

if TYPE_CHECKING:  # imports torch, which must stay out of the run's own process
    from svd.curation.scoring.unit import ClipScorer

START_METHOD = "spawn"  # CUDA does not survive a fork
PATIENCE = 5.0  # seconds that an idle process has to end by itself


class ScoringProcess:
    """A child process that scores units; its networks are loaded when it is made.

    Raises UserError for missing weights. The child ends when this process does, however that happens.
    """

    def __init__(self, config: CurationConfig, encoders: EncodersConfig, folder: Path) -> None:
        context = multiprocessing.get_context(START_METHOD)
        self._connection, theirs = context.Pipe()
        # mypy: the contexts of the start methods have no common class with Process.
        self._process = context.Process(target=_serve, args=(theirs, config, encoders, folder), daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def score_unit(self, measured: Path, folder: Path, shard_bytes: int) -> None:
        """Score a unit as `ClipScorer.score_unit` does; its errors are raised here.

        Raises UserError when the process has died.
        """
        with contextlib.suppress(BrokenPipeError):  # the process has died; the wait says how
            self._connection.send(ScoreUnit(measured, folder, shard_bytes))
        self._wait()

    def _wait(self) -> None:
        """Wait until the child is ready or done with its request; raises its error."""
        try:
            message = receive(self._connection)
        except EOFError:
            self._process.join(PATIENCE)
            raise UserError(
                f"the process with curation's networks ended with {exit_name(self._process.exitcode)} (SIGKILL: "
                "probably the machine ran out of memory); run the stage again, it goes on where it was"
            ) from None
        if isinstance(message, Raised):
            raise message.error

    def close(self) -> None:
        """End the child process; a unit that it is scoring is lost."""
        with contextlib.suppress(BrokenPipeError):
            self._connection.send(Stop())
        self._process.join(PATIENCE)  # an idle process ends by itself and cleans up
        self._process.kill()
        self._process.join()
        self._process.close()
        self._connection.close()


def _serve(connection: Connection, config: CurationConfig, encoders: EncodersConfig, folder: Path) -> None:
    """Run the child: load everything, send `Ready`, then score units until `Stop`; an error ends it with `Raised`."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl+C ends
    try:
        scorer = _load(config, encoders, folder)
        connection.send(Ready())
        while isinstance(request := connection.recv(), ScoreUnit):
            scorer.score_unit(request.measured, request.folder, request.shard_bytes)
            connection.send(Done())
    except EOFError:
        return
    except Exception as error:
        error.add_note(traceback.format_exc())  # a traceback itself can't be sent
        connection.send(Raised(error))


def _load(config: CurationConfig, encoders: EncodersConfig, folder: Path) -> ClipScorer:
    """Load the networks that the preset names; raises UserError for missing weights."""
    # Imported in the child: torch must stay out of the run's own process.
    from svd.curation.captions.registry import make_captioners
    from svd.curation.scoring import embeddings
    from svd.curation.scoring.unit import ClipScorer, Head
    from svd.model.formats.encoders import load_encoders

    device = pick_device()
    heads: dict[str, Head] = {}
    if encoders.aesthetics_weights:
        head = embeddings.load_aesthetics(Path(encoders.aesthetics_weights))
        heads["aesthetics"] = functools.partial(embeddings.aesthetics, head=head)
    if config.nsfw_weights:
        heads["nsfw"] = embeddings.load_nsfw(Path(config.nsfw_weights)).scores
    return ClipScorer(
        encoders=load_encoders(folder, encoders, device),
        captioners=make_captioners(config.captions, device),
        used=config.captions.captioners,
        heads=heads,
        device=device,
    )
