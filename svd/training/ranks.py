"""The place of this process among the ranks of a training, and the meeting of ranks that torchrun or srun started.

All of them run the same command. Only the first one takes the stage's lock, fetches its inputs, reports and publishes;
the others wait until it announces the stage's context. On several nodes they share the project's folder. Nothing here
imports torch before it is needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from svd.config import Preset
from svd.core.errors import UserError
from svd.stage import StageContext

FIRST_RANK_PATIENCE = timedelta(hours=6)  # it may have to fetch the inputs of the stage
BESIDE_LIGHTNING = 10_000  # Slurm has no store of its own; Lightning takes the main port later


def launched() -> bool:
    """Return whether a launcher started this process as one of several ranks: torchrun, srun, or `launch`."""
    return "LOCAL_RANK" in os.environ or _of_srun()


def _of_srun() -> bool:
    """Return whether this is a Slurm step of several tasks; a batch script alone has all but this variable."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def rank() -> int:
    """Return the number of this process over all nodes; 0 when no launcher started it."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ.get("RANK", os.environ["LOCAL_RANK"]))
    return int(os.environ["SLURM_PROCID"]) if _of_srun() else 0


@cache
def _store() -> Any:
    """Return the store where ranks meet before Lightning's: torchrun's, or one that lives as long as the first rank.

    It is a torch.distributed.TCPStore. Raises UserError for a way of calling srun that Lightning refuses.
    """
    from torch.distributed import TCPStore

    if "TORCHELASTIC_RUN_ID" in os.environ:
        return TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=FIRST_RANK_PATIENCE
        )
    place = _slurm() if _of_srun() else None
    host = place.main_address if place else os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = (place.main_port if place else int(os.environ["MASTER_PORT"])) + BESIDE_LIGHTNING
    return TCPStore(host, port, is_master=rank() == 0, wait_for_workers=False, timeout=FIRST_RANK_PATIENCE)


def _slurm() -> Any:
    """Return Lightning's view of the Slurm step, a SLURMEnvironment."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    try:
        return SLURMEnvironment()
    except RuntimeError as error:  # it wants --ntasks-per-node and checks for it
        raise UserError(f"srun: {error}") from None


def _key() -> str:
    return f"svd/context/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


@contextmanager
def leading() -> Iterator[None]:
    """Do the first rank's part of a stage; when it ends without `announce`, by a mistake say, release the others."""
    try:
        yield
    finally:
        if launched():
            _store().compare_set(_key(), "", "null")


def announce(context: StageContext) -> None:
    """Send the stage's context to the other ranks, which wait in `await_first_rank`."""
    if launched():
        inputs = {name: str(path) for name, path in context.inputs.items()}
        values = {"preset": context.preset.model_dump(mode="json"), "inputs": inputs}
        _store().set(_key(), json.dumps(values | {"output": str(context.output), "work": str(context.work)}))


def await_first_rank() -> StageContext | None:
    """Wait for the context that the first rank announces, and return it without tracker; None: nothing to do."""
    values = json.loads(_store().get(_key()))
    if values is None:
        return None
    inputs = {name: Path(path) for name, path in values["inputs"].items()}
    return StageContext(Preset.model_validate(values["preset"]), inputs, Path(values["output"]), Path(values["work"]))
