"""Opening a renderer: moderngl on EGL without a display or, where there is no EGL, VTK through pyvista.

A renderer lives in a process of its own that never imports torch: Mesa's software rasteriser and Triton each bring an
LLVM, and a process that holds both crashes. A driver that crashes takes down nothing but that process.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from svd.core.errors import UserError
from svd.orbits.meshes import Mesh
from svd.orbits.render import Light, Renderer

_ADVICE = (
    "no renderer works on this machine: moderngl needs EGL (Debian and Ubuntu: apt-get install libegl1 "
    "libgl1-mesa-dri), pyvista needs `pip install pyvista` and libgl1"
)


@contextlib.contextmanager
def open_renderer(kind: Literal["auto", "moderngl", "pyvista"] = "auto") -> Iterator[Renderer]:
    """Open a renderer; "auto" takes moderngl and, when that does not start, pyvista.

    Raises UserError that says why none starts and what to install. For example:

        with open_renderer() as renderer:
            frames = render_orbit(mesh, orbit_azimuths(21), 10, 576, 33.8, 2, white_light(), renderer)
    """
    reasons = []
    for name in ("moderngl", "pyvista") if kind == "auto" else (kind,):
        process = _RendererProcess(name)
        with contextlib.closing(process):
            if process.failure is None:
                yield process
                return
            reasons.append(f"{name}: {process.failure}")
    raise UserError(f"{_ADVICE} ({'; '.join(reasons)})")


class _RendererProcess:
    """A renderer in a child process; requests and images travel through its standard input and output."""

    def __init__(self, name: str) -> None:
        self.name = name
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close(); drivers warn about displays there
        self._child = subprocess.Popen(
            [sys.executable, "-m", "svd.orbits.renderer", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self.failure: str | None = None
        try:
            self.failure = self._receive()
        except ChildProcessError as error:
            self.failure = str(error)

    def views(self, mesh: Mesh, eyes: NDArray[np.float64], size: int, fov: float, light: Light) -> NDArray[np.uint8]:
        """Render the mesh as seen from each of `eyes` (V, 3) towards the origin, (V, size, size, 4).

        Raises UserError when the driver fails or crashes on this mesh.
        """
        try:
            assert self._child.stdin is not None
            _send(self._child.stdin, (mesh, eyes, size, fov, light))
            answer = self._receive()
        except (ChildProcessError, BrokenPipeError) as error:
            raise UserError(f"{mesh.name}: the renderer '{self.name}' failed: {error}") from None
        if isinstance(answer, str):
            raise UserError(f"{mesh.name}: the renderer '{self.name}' failed: {answer}")
        return np.asarray(answer, np.uint8)

    def _receive(self) -> Any:
        assert self._child.stdout is not None
        try:
            return pickle.load(self._child.stdout)
        except (EOFError, pickle.UnpicklingError):  # it ended before an answer, or in the middle of one
            code = self._child.wait()
            self._messages.seek(0)
            lines = self._messages.read().decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            raise ChildProcessError(f"its process ended with code {code} {last}".strip()) from None

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            if self._child.stdin is not None:
                self._child.stdin.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()
        self._messages.close()


def _send(stream: BinaryIO | Any, value: Any) -> None:
    pickle.dump(value, stream, protocol=pickle.HIGHEST_PROTOCOL)
    stream.flush()


def _serve(name: str) -> None:
    """Run in the child: open the renderer, send None or the reason why not, then answer until the input ends."""
    # Libraries may print to descriptor 1 at any time, so the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from svd.orbits.render_gl import open_moderngl
    from svd.orbits.render_vtk import open_pyvista

    opened = open_moderngl() if name == "moderngl" else open_pyvista()
    _send(answers, opened if isinstance(opened, str) else None)
    if isinstance(opened, str):
        return
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        try:
            answer: Any = opened.views(*request)
        except Exception as error:  # whatever a driver raises becomes one line in the parent
            answer = f"{type(error).__name__}: {error}"
        _send(answers, answer)
    opened.close()


if __name__ == "__main__":
    _serve(sys.argv[1])
