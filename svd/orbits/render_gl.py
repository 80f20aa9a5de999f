"""The moderngl renderer: OpenGL 3.3 on EGL, no display needed; Mesa's llvmpipe when there is no GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from svd.orbits.meshes import Mesh, Part
from svd.orbits.render import GAMMA, SUPERSAMPLING, Light, downsample, look_at

_VERTEX = """
#version 330
uniform mat4 view_projection;
in vec3 place; in vec3 normal; in vec2 uv;
out vec3 at; out vec3 n; out vec2 coordinates;
void main() { at = place; n = normal; coordinates = uv; gl_Position = view_projection * vec4(place, 1.0); }
"""
_FRAGMENT = """
#version 330
uniform sampler2D picture; uniform vec3 eye; uniform vec3 light[9]; uniform float headlight; uniform float gamma;
in vec3 at; in vec3 n; in vec2 coordinates;
out vec4 colour;
void main() {
    vec3 d = normalize(gl_FrontFacing ? n : -n);
    vec3 sky = light[0] * 0.282095 + 0.488603 * (light[1] * d.y + light[2] * d.z + light[3] * d.x)
        + 1.092548 * (light[4] * d.x * d.y + light[5] * d.y * d.z + light[7] * d.x * d.z)
        + light[6] * 0.315392 * (3.0 * d.z * d.z - 1.0) + light[8] * 0.546274 * (d.x * d.x - d.y * d.y);
    float facing = max(dot(d, normalize(eye - at)), 0.0);
    vec3 shade = (1.0 - headlight) * max(sky, 0.0) + headlight * facing;
    vec3 albedo = pow(texture(picture, coordinates).rgb, vec3(gamma));
    colour = vec4(pow(clamp(albedo * shade, 0.0, 1.0), vec3(1.0 / gamma)), 1.0);
}
"""


def _perspective(fov: float, near: float, far: float) -> NDArray[np.float64]:
    f = 1 / np.tan(np.deg2rad(fov) / 2)
    depth = (far + near) / (near - far), 2 * far * near / (near - far)
    return np.array([[f, 0, 0, 0], [0, f, 0, 0], [0, 0, *depth], [0, 0, -1, 0]])


class ModernGL:
    """A renderer with OpenGL; usable only by the thread that made it."""

    name = "moderngl"

    def __init__(self, context: Any) -> None:
        self._context = context
        self._program = context.program(vertex_shader=_VERTEX, fragment_shader=_FRAGMENT)

    def close(self) -> None:
        """Release the context."""
        self._context.release()

    def _upload(self, part: Part) -> tuple[Any, Any, list[Any]]:
        interleaved = np.concatenate([part.vertices, part.normals, part.uv], 1).astype("f4")
        vertices = self._context.buffer(interleaved.tobytes())
        indices = self._context.buffer(part.faces.astype("i4").tobytes())
        content = [(vertices, "3f 3f 2f", "place", "normal", "uv")]
        array = self._context.vertex_array(self._program, content, indices)
        height, width = part.texture.shape[:2]
        texture = self._context.texture((width, height), 3, part.texture.tobytes(), alignment=1)
        texture.build_mipmaps()
        texture.anisotropy = 8.0
        return array, texture, [array, texture, vertices, indices]

    def views(self, mesh: Mesh, eyes: NDArray[np.float64], size: int, fov: float, light: Light) -> NDArray[np.uint8]:
        """Render the mesh as seen from each of `eyes` (V, 3) towards the origin, (V, size, size, 4)."""
        side = size * SUPERSAMPLING
        colour = self._context.texture((side, side), 4)
        depth = self._context.depth_renderbuffer((side, side))
        target = self._context.framebuffer([colour], depth)
        uploaded = [self._upload(part) for part in mesh.parts]
        self._program["light"].value = [tuple(map(float, row)) for row in light.irradiance]
        self._program["headlight"].value = light.headlight
        self._program["gamma"].value = GAMMA
        images = np.empty((len(eyes), side, side, 4), np.uint8)
        try:
            for i, eye in enumerate(eyes):
                images[i] = self._draw(target, uploaded, eye, fov, side)
        finally:
            for thing in (target, depth, colour, *(thing for _, _, things in uploaded for thing in things)):
                thing.release()
        return downsample(images)

    def _draw(
        self, target: Any, uploaded: list[tuple[Any, Any, list[Any]]], eye: NDArray[np.float64], fov: float, side: int
    ) -> NDArray[np.uint8]:
        import moderngl

        distance = float(np.linalg.norm(eye))
        matrix = _perspective(fov, max(distance - 1, 0.01), distance + 1) @ look_at(eye)
        target.use()
        target.clear(0.0, 0.0, 0.0, 0.0)
        self._context.enable_only(moderngl.DEPTH_TEST)
        self._program["view_projection"].write(matrix.T.astype("f4").tobytes())
        self._program["eye"].value = tuple(map(float, eye))
        for array, texture, _ in uploaded:
            texture.use(0)
            array.render()
        return np.frombuffer(target.read(components=4), np.uint8).reshape(side, side, 4)[::-1]


def open_moderngl() -> ModernGL | str:
    """Open the renderer, or return why there is none."""
    import moderngl

    try:
        options: dict[str, Any] = {"backend": "egl"}
        return ModernGL(moderngl.create_context(standalone=True, **options))
    except Exception as error:  # glcontext raises bare Exception when libEGL or a driver is missing
        return " ".join(str(error).split()) or type(error).__name__
