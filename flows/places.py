"""Where the things of one stage of one preset lie: a `Place` owns every path and address, both ways.

All paths are relative to the working folder, which is the project's: presets/, params.yaml, dvc.yaml, outputs/ and
work/ belong to it, never to the installed package. So git worktrees, `dvc exp run --temp` and second clones use their
own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flows.stages import STAGES, find_stage
from svd.core.errors import UserError

OUTPUTS = Path("outputs")
WORK = Path("work")
PROFILES = Path(".local") / "profiles"


@dataclass(frozen=True)
class Place:
    """The place of a stage (or of a pipeline, which has no output) under a preset, both by name.

    Example: `Place("tiny", "latents").output` is `outputs/tiny/latents`.
    """

    preset: str
    stage: str

    @classmethod
    def of_output(cls, path: str | Path) -> Place:
        """Return the place whose output is `path`; raises UserError when no stage makes it."""
        parts = Path(path).parts
        if len(parts) != 3 or parts[0] != str(OUTPUTS) or parts[2] not in STAGES:
            raise UserError(f"'{path}' is no output of a stage; expected outputs/<preset>/<stage>")
        return cls(parts[1], parts[2])

    @classmethod
    def of_work(cls, work: Path) -> Place:
        """Return the place that the work folder `work/<preset>/<stage>/<digest>` belongs to."""
        return cls(*work.parts[-3:-1])

    @property
    def output(self) -> Path:
        """Return the folder that the stage publishes: outputs/<preset>/<stage>."""
        return OUTPUTS / self.preset / self.stage

    @property
    def inventory(self) -> Path:
        """Return the list of its code, packages and files outside: outputs/<preset>/inventory/<stage>.json."""
        return OUTPUTS / self.preset / "inventory" / f"{self.stage}.json"

    @property
    def inputs(self) -> dict[str, Path]:
        """Return the folder of each input by the name of its stage, whether or not it is there."""
        return {name: Place(self.preset, name).output for name in find_stage(self.stage).inputs}

    @property
    def works(self) -> Path:
        """Return the folder of its work folders, one per state of options and inputs: work/<preset>/<stage>."""
        return WORK / self.preset / self.stage

    @property
    def lock(self) -> Path:
        """Return the lock file that the process which runs it holds."""
        return WORK / self.preset / f".{self.stage}.lock"

    @property
    def profiles(self) -> Path:
        """Return the folder of the traces of `svd stage --profile`: .local/profiles/<preset>/<stage>."""
        return PROFILES / self.preset / self.stage

    @property
    def run_key(self) -> Path:
        """Return the file with the MLflow key of a pipeline's run; a stage has one per work folder (`run_key_of`)."""
        return WORK / self.preset / f".{self.stage}.run"

    def work(self, digest: str) -> Path:
        """Return the folder for work in progress on exactly the options and inputs that `digest` names."""
        return self.works / digest


def run_key_of(work: Path) -> Path:
    """Return the file with the MLflow key of the run that works in `work`."""
    return work.with_name(f"{work.name}.run")
