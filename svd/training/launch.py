"""Start the processes of a training on this machine, one per device; on several nodes torchrun or srun does.

This process stays outside: it holds the tracker, watches the ranks and returns the result of the first one.
A rank that fails ends the others; SIGTERM is passed on, so that they save the step they are in. Lightning's own
launcher would run the command line again instead, which may be a whole pipeline or a Prefect worker's.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch.multiprocessing.spawn import ProcessContext, start_processes

from svd.core.errors import UserError
from svd.stage import NoTracker, StageContext
from svd.training.ranks import launched

T = TypeVar("T")
SAVING_SECONDS = 120


def on_all_ranks(section: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Make a function of a stage, `f(context, ...)`, run once for each device that the preset's `section` names.

    The function must be one of a module, its arguments and result must be picklable; the result is the first rank's.
    Raises UserError when the section wants several nodes and no launcher started this process.
    """

    def decorate(run: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(run)
        def launching(context: StageContext, *arguments: Any) -> T:
            compute = context.preset.compute.of(section)
            count = max(1, torch.cuda.device_count()) if compute.devices == "auto" else compute.devices
            if launched() or (count == 1 and compute.nodes == 1):
                with _environment_kept():
                    return run(context, *arguments)
            if compute.nodes > 1:
                raise UserError(
                    f"compute.{section}.nodes is {compute.nodes}: start this command on every node with `srun`, or "
                    f"with `torchrun --nnodes {compute.nodes} --nproc-per-node {count} … -m flows.cli`"
                )
            result: T = _launch(count, launching, context, arguments)
            return result

        return launching

    return decorate


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Restore the environment: by the variables that Lightning leaves, the next stage would take itself for a rank."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _launch(count: int, run: Callable[..., Any], context: StageContext, arguments: tuple[Any, ...]) -> Any:
    """Run on `count` processes of this machine; return the first one's result, raise a rank's UserError as its own.

    Raises torch.multiprocessing.ProcessException for a rank that died otherwise.
    """
    messages: Messages = multiprocessing.get_context("spawn").SimpleQueue()
    heard = _Heard()
    listener = threading.Thread(target=_listen, args=(messages, context.tracker, heard), daemon=True)
    listener.start()
    work = _Work(run, replace(context, tracker=NoTracker()), arguments, count, find_free_network_port())
    with _sigterm_raises():
        ranks = start_processes(_run_rank, (work, messages), count, join=False)
        try:
            while not ranks.join(timeout=1):
                if heard.tracker_error is not None:
                    raise heard.tracker_error
        except BaseException:
            _stop(ranks)
            listener.join(1)
            if isinstance(heard.answer, Mistake):
                raise UserError(heard.answer.text) from None
            raise
    listener.join()
    if heard.tracker_error is not None:
        raise heard.tracker_error
    assert isinstance(heard.answer, RankResult)
    return heard.answer.value


@dataclass(frozen=True)
class TrackerCall:
    """Message of the first rank: call this method of the tracker."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class RankResult:
    """Message of the first rank: the function has returned."""

    value: Any


@dataclass(frozen=True)
class Mistake:
    """Message of any rank: a UserError, by its text; the rank ends."""

    text: str


Message = TrackerCall | RankResult | Mistake


class Messages(Protocol):
    """The queue from the ranks to this process."""

    def put(self, message: Message, /) -> None:
        """Send a message."""

    def get(self) -> Message:
        """Wait for a message."""


@dataclass
class _Heard:
    """The end of listening: the ranks' answer, or an error of the tracker."""

    answer: RankResult | Mistake | None = None
    tracker_error: Exception | None = None


@dataclass(frozen=True)
class _Work:
    """The work of the started processes, and the port where they meet."""

    run: Callable[..., Any]
    context: StageContext
    arguments: tuple[Any, ...]
    ranks: int
    port: int


def _run_rank(number: int, work: _Work, messages: Messages) -> None:
    """Run in a started process; Lightning reads its place from these variables."""
    os.environ.pop("SLURM_NTASKS", None)  # Slurm started the first process, not these
    os.environ |= {"LOCAL_RANK": str(number), "NODE_RANK": "0", "WORLD_SIZE": str(work.ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(work.port)}
    context = replace(work.context, tracker=_Relay(messages)) if number == 0 else work.context
    try:
        result = work.run(context, *work.arguments)
    except UserError as error:
        messages.put(Mistake(str(error)))
        raise
    if number == 0:
        messages.put(RankResult(result))


class _Relay:
    """The first rank's tracker: sends every call to the process outside. Logged files must outlive the stage's step."""

    def __init__(self, messages: Messages) -> None:
        self._messages = messages

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self._messages.put(TrackerCall(name, args, kwargs))


def _listen(messages: Messages, tracker: Any, heard: _Heard) -> None:
    """Relay the tracker's calls until the ranks answer, or the tracker fails: then nobody hears the ranks any more."""
    while heard.answer is None and heard.tracker_error is None:
        message = messages.get()
        if isinstance(message, TrackerCall):
            try:
                getattr(tracker, message.method)(*message.args, **message.kwargs)
            except Exception as error:
                heard.tracker_error = error
        else:
            heard.answer = message


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM end this process through an exception, unless somebody else (Prefect) handles it already."""
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(ranks: ProcessContext) -> None:
    """Let the ranks save the step they are in; kill those that can't."""
    for process in ranks.processes:
        process.terminate()
    for process in ranks.processes:
        process.join(SAVING_SECONDS)
        process.kill()
