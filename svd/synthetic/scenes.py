"""Seeded, captioned scenes: a shape acts before a background while the camera moves.

A `World` is an endless list of scenes, in one of two styles. "textured" is the rich one: 8 shapes in 10 colours and 4
textures over 7 mottled backgrounds, 12 actions and 9 camera motions at once. "plain" can be learned in minutes: 3
shapes in 4 even colours over 2 smooth patterns in 3 colours, and either the shape moves or the camera, in 8 ways.

The splits "train" and "test" use the same vocabulary and share no seed. Textured, they share no (shape, colour,
texture) and no (background, colour) combination; plain, no combination of shape, colours, background and motion.

Positions are in units of the frame's height with the origin in the middle and y pointing down; times are in seconds
around the middle of the scene.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from svd.synthetic.drawing import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    TEXTURES,
    Floats,
    background_tile,
    flat_sprite,
    smooth_tile,
    sprite,
)

Split = Literal["train", "test"]
Style = Literal["textured", "plain"]

CAMERAS: dict[str, str] = {
    "static": "the camera is static",
    "pan-left": "the camera pans left",
    "pan-right": "the camera pans right",
    "tilt-up": "the camera tilts up",
    "tilt-down": "the camera tilts down",
    "zoom-in": "the camera zooms in",
    "zoom-out": "the camera zooms out",
    "roll": "the camera rolls",
    "handheld": "the camera shakes",
}
ACTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "bouncing",
    "swinging",
    "spinning",
    "growing",
    "shrinking",
    "orbiting",
    "passing behind",
    "standing still",
)
_DIRECTION = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
# The vocabulary of the plain style; a motion is an action before a static camera, or a camera before a still shape.
PLAIN_SHAPES = ("circle", "square", "triangle")
PLAIN_COLOURS = ("red", "yellow", "blue", "white")
PLAIN_BACKGROUNDS = ("checks", "stripes")
PLAIN_BACKGROUND_COLOURS = ("green", "brown", "grey")
PLAIN_ACTIONS = ("moving left", "moving right", "moving up", "moving down")
PLAIN_CAMERAS = ("pan-left", "pan-right", "zoom-in", "zoom-out")
_TILE_HEIGHTS = 2.0
_CAMERA_FOLLOWS: dict[Style, float] = {"textured": 0.7, "plain": 0.0}  # share of a pan that objects take part in
_TEST_SHARE = 4


@dataclass(frozen=True)
class Thing:
    """The look of an object."""

    shape: str
    colour: str
    texture: str

    @property
    def words(self) -> str:
        """The object in a caption."""
        return " ".join(w for w in (self.colour, self.texture if self.texture != "plain" else "", self.shape) if w)


@dataclass(frozen=True)
class Scene:
    """Everything that defines a scene; rendering it twice gives the same pixels.

    speed: multiplies the action's rate; camera_speed: the camera's; sign: the direction of rolls, spins and orbits.
    """

    seed: tuple[int, ...]
    thing: Thing
    other: Thing
    background: str
    background_colour: str
    action: str
    camera: str
    size: float
    speed: float
    camera_speed: float
    sign: int
    start: tuple[float, float]
    style: Style = "textured"

    @property
    def caption(self) -> str:
        """One sentence about everything visible.

        For example: a red ring moving left over green checks, the camera is static. In the plain style it names the
        one motion there is: a red circle moving left over green checks; a red circle over green checks, the camera
        zooms in.
        """
        if self.style == "plain":
            action = f" {self.action}" if self.camera == "static" else ""
            scene = f"a {self.thing.words}{action} over {self.background_colour} {self.background}"
            return scene if self.camera == "static" else f"{scene}, {CAMERAS[self.camera]}"
        action = self.action
        if action in ("orbiting", "passing behind"):
            action = f"{action} a {self.other.words}"
        article = "an" if self.thing.words[0] in "aeiou" else "a"
        scene = f"{article} {self.thing.words} {action} over {self.background_colour} {self.background}"
        return f"{scene}, {CAMERAS[self.camera]}".replace(" a orange", " an orange")

    @property
    def camera_label(self) -> str:
        """Return the camera label that curation should find: "object-motion" for a static camera with motion."""
        if self.camera == "static" and self.action != "standing still":
            return "object-motion"
        return self.camera


@dataclass(frozen=True)
class Clip:
    """A rendered scene: frames (T, H, W, 3) uint8 RGB and the truth about them."""

    frames: NDArray[np.uint8]
    caption: str
    shape: str
    colour: str
    action: str
    camera: str
    scene: Scene


def combinations(split: Split) -> tuple[list[Thing], list[tuple[str, str]]]:
    """List the objects and the (background, colour) pairs that may occur in a split; the two splits share none.

    Every word occurs in both: the test split has a quarter of the combinations, spread like diagonals of a chessboard.
    """
    wanted = split == "test"
    colours = list(COLOURS)
    things = [
        Thing(SHAPES[s], colours[c], TEXTURES[t])
        for s, c, t in itertools.product(range(len(SHAPES)), range(len(colours)), range(len(TEXTURES)))
        if ((s + c + t) % _TEST_SHARE == 0) == wanted
    ]
    pairs = [
        (BACKGROUNDS[b], colours[c])
        for b, c in itertools.product(range(len(BACKGROUNDS)), range(len(colours)))
        if ((b + c) % _TEST_SHARE == 0) == wanted
    ]
    return things, pairs


class World:
    """An endless list of scenes of one split; scene `index` depends on nothing but seed, split and index."""

    def __init__(self, seed: int, split: Split, style: Style = "textured") -> None:
        self.seed = seed
        self.split: Split = split
        self.style: Style = style
        self._things, self._backgrounds = combinations(split)

    def key(self, index: int, purpose: int) -> tuple[int, ...]:
        """Return the seed of one random decision, so that decisions don't influence each other."""
        return (self.seed, 0 if self.split == "train" else 1, index, purpose)

    def scene(self, index: int) -> Scene:
        """Draw scene `index`; something always moves (planted static shots come from `still`)."""
        return self._plain(index) if self.style == "plain" else self._textured(index)

    def _textured(self, index: int) -> Scene:
        generator = np.random.default_rng(self.key(index, 0))
        action = str(generator.choice(ACTIONS))
        moving = [c for c in CAMERAS if c != "static"]
        static = action != "standing still" and generator.random() < 0.4
        camera = "static" if static else str(generator.choice(moving))
        background, background_colour = self._backgrounds[generator.integers(len(self._backgrounds))]
        things = [t for t in self._things if t.colour != background_colour]
        if action == "spinning":
            things = [t for t in things if t.texture != "plain"]
        thing = things[generator.integers(len(things))]
        others = [t for t in things if t.colour != thing.colour]
        return Scene(
            seed=self.key(index, 1),
            thing=thing,
            other=others[generator.integers(len(others))],
            background=background,
            background_colour=background_colour,
            action=action,
            camera=camera,
            size=float(generator.uniform(0.38, 0.52)),
            speed=float(generator.uniform(0.8, 1.25)),
            camera_speed=float(generator.uniform(0.8, 1.25)),
            sign=int(generator.choice([-1, 1])),
            start=(float(generator.uniform(-0.3, 0.3)), float(generator.uniform(-0.15, 0.15))),
        )

    def _plain(self, index: int) -> Scene:
        generator = np.random.default_rng(self.key(index, 0))
        motions = [*((action, "static") for action in PLAIN_ACTIONS), *(("standing still", c) for c in PLAIN_CAMERAS)]
        words = (PLAIN_SHAPES, PLAIN_COLOURS, PLAIN_BACKGROUNDS, PLAIN_BACKGROUND_COLOURS, motions)
        while True:
            drawn = [int(generator.integers(len(choices))) for choices in words]
            if (sum(drawn) % _TEST_SHARE == 0) == (self.split == "test"):
                break
        shape, colour, background, background_colour = (
            choices[number] for choices, number in zip(words[:4], drawn[:4], strict=True)
        )
        thing = Thing(shape, colour, "plain")
        action, camera = motions[drawn[4]]
        beside = 0.1 if camera.startswith("pan") else 0.22  # so that a pan doesn't begin or end without the shape
        return Scene(
            seed=self.key(index, 1),
            thing=thing,
            other=thing,
            background=background,
            background_colour=background_colour,
            action=action,
            camera=camera,
            size=float(generator.uniform(0.44, 0.54)),
            speed=float(generator.uniform(0.75, 1.3)),
            camera_speed=float(generator.uniform(0.75, 1.3)),
            sign=1,
            start=(float(generator.uniform(-beside, beside)), float(generator.uniform(-0.22, 0.22))),
            style="plain",
        )


def still(scene: Scene) -> Scene:
    """Return the same scene with nothing moving."""
    return replace(scene, action="standing still", camera="static")


def camera_pose(scene: Scene, t: float) -> tuple[NDArray[np.float64], float, float]:
    """Return the camera's pose at time t: offset (2,) in heights, zoom factor, roll angle in radians."""
    offset, zoom, angle = np.zeros(2), 1.0, 0.0
    speed = scene.camera_speed
    if scene.camera.startswith("pan"):
        offset[0] = (1 if scene.camera == "pan-right" else -1) * 0.4 * speed * t
    elif scene.camera.startswith("tilt"):
        offset[1] = (1 if scene.camera == "tilt-down" else -1) * 0.35 * speed * t
    elif scene.camera.startswith("zoom"):
        zoom = float(np.exp((1 if scene.camera == "zoom-in" else -1) * 0.32 * speed * t))
    elif scene.camera == "roll":
        angle = scene.sign * np.deg2rad(24) * speed * t
    elif scene.camera == "handheld":
        generator = np.random.default_rng(scene.seed)
        phase, rate = generator.uniform(0, 2 * np.pi, (3, 3)), generator.uniform(1.0, 4.5, (3, 3))
        shake = (np.sin(phase + 2 * np.pi * rate * t) / rate**0.5).sum(1)
        offset, angle = 0.022 * speed * shake[:2], 0.012 * speed * shake[2]
    return offset, zoom, angle


def object_poses(scene: Scene, t: float, half: float) -> list[tuple[Thing, float, float, float, float]]:
    """List the objects at time t from back to front: (thing, x, y, size, angle).

    t: seconds from the middle of the scene; half: half the scene's seconds; sizes and places in heights of the frame.
    """
    x, y = scene.start
    size, angle, speed = scene.size, 0.0, scene.speed
    things: list[tuple[Thing, float, float, float, float]] = []
    if scene.action in _DIRECTION:
        dx, dy = _DIRECTION[scene.action]
        rate = min(0.5 * speed, 0.55 / max(half, 1e-6))
        x, y = x * abs(dy) + dx * rate * t, y * abs(dx) + dy * rate * t
    elif scene.action == "bouncing":
        y = 0.22 - 0.42 * abs(np.sin(np.pi * 0.9 * speed * t + scene.start[0] * 5))
    elif scene.action == "swinging":
        x = 0.4 * np.sin(2 * np.pi * 0.55 * speed * t + scene.start[0] * 5)
        angle = -0.5 * x
    elif scene.action == "spinning":
        angle = scene.sign * np.deg2rad(150) * speed * t
    elif scene.action in ("growing", "shrinking"):
        size *= float(np.exp((0.55 if scene.action == "growing" else -0.55) * speed * t))
    elif scene.action == "orbiting":
        turn = scene.sign * 2 * np.pi * 0.5 * speed * t + scene.start[0] * 10
        size *= 0.7 * (1 + 0.2 * np.sin(turn))
        satellite = (scene.thing, 0.45 * np.cos(turn), 0.12 * np.sin(turn), size, 0.0)
        centre = (scene.other, 0.0, 0.0, scene.size * 0.8, 0.0)
        return [centre, satellite] if np.sin(turn) > 0 else [satellite, centre]
    elif scene.action == "passing behind":
        rate = scene.sign * min(0.5 * speed, 0.6 / max(half, 1e-6))
        things.append((scene.thing, rate * t, y, size, 0.0))
        return [*things, (scene.other, 0.0, y, size, 0.0)]
    return [(scene.thing, x, y, size, angle)]


def _blend(canvas: Floats, drawing: Floats, matrix: NDArray[np.float64]) -> None:
    """Draw premultiplied RGBA onto the canvas (H, W, 3); `matrix` (2, 3) maps its pixels to those of the canvas."""
    side = drawing.shape[0]
    corners = matrix @ np.array([[0, side, 0, side], [0, 0, side, side], [1, 1, 1, 1]])
    low = np.maximum(np.floor(corners.min(1)).astype(int), 0)
    high = np.minimum(np.ceil(corners.max(1)).astype(int) + 1, (canvas.shape[1], canvas.shape[0]))
    if (high <= low).any():
        return
    local = matrix.copy()
    local[:, 2] -= low
    warped = cv2.warpAffine(drawing, local, (int(high[0] - low[0]), int(high[1] - low[1])), flags=cv2.INTER_LINEAR)
    region = canvas[low[1] : high[1], low[0] : high[0]]
    region *= 1 - warped[..., 3:]
    region += warped[..., :3]


def _affine(scale: float, angle: float, centre: tuple[float, float], side: float) -> NDArray[np.float64]:
    """Return the matrix (2, 3) that rotates and scales a square of `side` pixels and puts its middle at `centre`."""
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.array([[c, -s], [s, c]])
    return np.concatenate([turn, (np.array(centre) - turn @ np.array([side / 2, side / 2]))[:, None]], 1)


def _drawings(scene: Scene, height: int) -> tuple[NDArray[np.uint8], NDArray[np.float64], dict[Thing, Floats]]:
    """Return the background's tile, where it begins in pixels (2,), and the sprites of the things."""
    generator = np.random.default_rng(scene.seed)
    side, sprite_side = int(_TILE_HEIGHTS * height), max(16, int(0.6 * height))
    if scene.style == "plain":
        tile = smooth_tile(scene.background, scene.background_colour, side)
        sprites = {scene.thing: flat_sprite(scene.thing.shape, scene.thing.colour, sprite_side)}
        return tile, generator.uniform(0, side, 2), sprites
    tile = background_tile(scene.background, scene.background_colour, side, generator)
    shift = generator.uniform(0, side, 2)
    sprites = {
        thing: sprite(thing.shape, thing.colour, thing.texture, sprite_side, generator)
        for thing in (scene.thing, scene.other)
    }
    return tile, shift, sprites


def render_scene(scene: Scene, frames: int, height: int, width: int, fps: float) -> NDArray[np.uint8]:
    """Render `frames` frames of a scene, (T, H, W, 3) uint8 RGB; the middle of the scene is the middle frame."""
    tile, shift, sprites = _drawings(scene, height)
    sprite_side = len(sprites[scene.thing])
    out = np.empty((frames, height, width, 3), np.uint8)
    half = (frames - 1) / fps / 2
    for i in range(frames):
        t = i / fps - half
        offset, zoom, angle = camera_pose(scene, t)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        to_tile = turn.T / zoom
        centre = np.array([width / 2 - 0.5, height / 2 - 0.5])
        origin = shift + offset * height - to_tile @ centre
        inverse = np.concatenate([to_tile, origin[:, None]], 1)
        canvas = cv2.warpAffine(
            tile, inverse, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_WRAP
        ).astype(np.float32)
        for thing, x, y, size, own_angle in object_poses(scene, t, half):
            place = turn @ (np.array([x, y]) - (1 - _CAMERA_FOLLOWS[scene.style]) * offset) * zoom * height + centre
            scale = size * zoom * height / sprite_side
            _blend(canvas, sprites[thing], _affine(scale, own_angle + angle, (place[0], place[1]), sprite_side))
        out[i] = np.clip(np.round(canvas), 0, 255)
    return out


def render_clip(world: World, index: int, frames: int, height: int, width: int, fps: float) -> Clip:
    """Render scene `index` of a world as a clip of `frames` frames at `fps`."""
    scene = world.scene(index)
    return clip_of(scene, render_scene(scene, frames, height, width, fps))


def clip_of(scene: Scene, frames: NDArray[np.uint8]) -> Clip:
    """Put the frames of a scene together with the truth about it."""
    return Clip(
        frames=frames,
        caption=scene.caption,
        shape=scene.thing.shape,
        colour=scene.thing.colour,
        action=scene.action,
        camera=scene.camera,
        scene=scene,
    )
