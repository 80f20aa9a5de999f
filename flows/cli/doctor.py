"""The checks of `svd doctor`: what this machine has, and for each thing that is missing what to do."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from svd.config import Preset
from svd.core.addresses import public_address
from svd.core.device import pick_device

State = Literal["ok", "note", "fail"]


@dataclass(frozen=True)
class Finding:
    """One check: its state, what was found, and what to do when that is not enough."""

    name: str
    state: State
    found: str
    advice: str = ""


def _python() -> Finding:
    version = platform.python_version_tuple()
    good = ("3", "11") <= version[:2] < ("3", "13")
    return Finding(
        "Python", "ok" if good else "fail", platform.python_version(), "" if good else "use Python 3.11 or 3.12"
    )


def _torch() -> Iterator[Finding]:
    try:
        import torch

        vision = _torchvision()
    except (ImportError, RuntimeError, OSError) as error:
        advice = "install torch and torchvision from the same index: make setup"
        yield Finding("torch", "fail", str(error).splitlines()[0], advice)
        return
    yield Finding("torch", "ok", f"torch {torch.__version__}, torchvision {vision}")
    if pick_device() == "cuda":
        from svd.model.kernels.operators import TRITON

        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield Finding("GPU", "ok", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB")
        if not TRITON:
            advice = "install gcc and Python's headers (python3-dev); without them sampling takes half as long again"
            yield Finding("GPU kernels", "note", "Triton can't build them, torch's are used", advice)
    else:
        advice = "the preset tiny needs none; finetune and paper need a CUDA device and its driver (nvidia-smi)"
        yield Finding("GPU", "note", f"none; {os.cpu_count()} CPU cores", advice)


def _torchvision() -> str:
    """Return torchvision's version once its operators are loaded; raises OSError when they don't fit torch.

    Importing the package would take twice as long as importing torch: it imports torch's compiler.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ImportError("No module named 'torchvision'")
    for library in sorted(Path(spec.origin).parent.glob("_C*.so")):
        torch.ops.load_library(library)
    return metadata.version("torchvision")


def _egl() -> Finding:
    """Try EGL in a child process: Mesa's LLVM and triton's in one process end in a segmentation fault."""
    probe = "import moderngl; c = moderngl.create_context(standalone=True, backend='egl'); print(c.info['GL_RENDERER'])"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return Finding("EGL", "ok", result.stdout.strip())
    advice = "install the system packages libegl1 and libgl1-mesa-dri, or set renderer: pyvista in the preset"
    return Finding("EGL", "note", (result.stderr.strip().splitlines() or ["crashed"])[-1], advice)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 2**30
    enough = free > 5
    return Finding("disk", "ok" if enough else "fail", f"{free:.0f} GiB free", "" if enough else "free 5 GiB or more")


def _git() -> Finding:
    found = shutil.which("git")
    advice = "" if found else "install git: DVC and the record of each run's commit need it"
    return Finding("git", "ok" if found else "fail", found or "not found", advice)


def _service(variable: str, purpose: str) -> Finding:
    address = os.environ.get(variable, "")
    if not address:
        return Finding(variable, "note", "not set", f"{purpose} uses its embedded default; `make up` starts a server")
    parts, address = urlsplit(address), public_address(address)
    if parts.scheme not in ("http", "https"):
        return Finding(variable, "ok", address)
    try:
        socket.create_connection(
            (parts.hostname or "", parts.port or 443 if parts.scheme == "https" else parts.port or 80), 3
        ).close()
    except OSError as error:
        return Finding(variable, "fail", f"{address}: {error}", f"start it (`make up`) or unset {variable}")
    return Finding(variable, "ok", f"{address} answers")


def _weights(preset: Preset) -> Iterator[Finding]:
    wanted = {
        "model.pretrained": preset.model.pretrained,
        "model.autoencoder.pretrained": preset.model.autoencoder.pretrained,
        "encoders.weights": preset.encoders.weights if preset.encoders.kind == "open_clip" else None,
        "encoders.aesthetics_weights": preset.encoders.aesthetics_weights,
        "curation.motion.raft_weights": preset.curation.motion.raft_weights,
        "curation.text.craft_weights": preset.curation.text.craft_weights,
        "evaluation.ucf101.weights": preset.evaluation.ucf101.weights,
        "evaluation.multiview.lpips_weights": preset.evaluation.multiview.lpips_weights,
        "curation.nsfw_weights": preset.curation.nsfw_weights,
    }
    wanted |= {f"autoencoder.perceptual_weights.{i}": w for i, w in enumerate(preset.autoencoder.perceptual_weights)}
    for option, value in wanted.items():
        if value is None:
            continue
        if Path(value).exists():
            yield Finding(option, "ok", value)
        elif value.startswith((".", "/")) or value.endswith((".pt", ".pth", ".safetensors")):
            yield Finding(option, "fail", f"{value}: no such file", f"put the file there or change '{option}'")
        else:
            yield Finding(option, "note", value, "is fetched from the hub at first use; `svd fetch` does it now")


def _extras() -> Finding:
    extras = {"kubernetes": "prefect_kubernetes", "captions": "transformers"}
    missing = [extra for extra, module in extras.items() if importlib.util.find_spec(module) is None]
    advice = f"pip install 'svd-platform[{','.join(missing)}]' when you need them" if missing else ""
    return Finding(
        "extras", "note" if missing else "ok", f"missing: {', '.join(missing)}" if missing else "all", advice
    )


def run_checks(preset: Preset) -> Iterator[Finding]:
    """Yield the findings of all checks, cheapest first."""
    checks: list[Callable[[], Finding]] = [_python, _git, lambda: _disk(Path.cwd()), _egl, _extras]
    yield from (check() for check in checks)
    yield from _torch()
    yield _service("PREFECT_API_URL", "Prefect")
    yield _service("MLFLOW_TRACKING_URI", "MLflow")
    yield _service("AWS_ENDPOINT_URL", "object storage")
    yield from _weights(preset)
