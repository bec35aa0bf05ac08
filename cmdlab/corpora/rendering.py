"""Draws a scene: shapes as signed distances, on a cluttered and noisy background."""

from collections.abc import Callable

import numpy as np

from cmdlab.corpora.scenes import COLUMNS, ROWS, Scene

IMAGE_SIZE = 64  # pixels
CELL = IMAGE_SIZE / 3
RADIUS = {"small": 5.5, "medium": 7.5, "large": 10.0}  # pixels
RGB = {
    "red": (214, 39, 40),
    "orange": (255, 138, 20),
    "yellow": (250, 222, 50),
    "green": (40, 160, 60),
    "cyan": (50, 205, 215),
    "blue": (40, 80, 220),
    "purple": (140, 60, 190),
    "pink": (250, 140, 190),
    "brown": (130, 80, 45),
    "white": (248, 248, 248),
}

Plane = np.ndarray  # float32 [64, 64], or a window of that
Y, X = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE].astype(np.float32) + np.float32(0.5)  # of the pixels
EXTENT = 1.5  # radii from its centre beyond which no object covers any part of a pixel


def render(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The picture and the boxes of its objects.

    Returns uint8 [64, 64, 3] and float32 [objects, 4], (x0, y0, x1, y1) in pixels with the origin
    at the top left. Places in the cell, rotation, lighting, clutter and noise are drawn from `rng`.
    """
    picture = _background(X, Y, rng).astype(np.float64)
    boxes = np.zeros((len(scene.objects), 4), np.float32)
    for i, item in enumerate(scene.objects):
        radius = RADIUS[item.size] * rng.uniform(0.93, 1.07)
        centre_x = (COLUMNS.index(item.column) + 0.5) * CELL + rng.uniform(-2.5, 2.5)
        centre_y = (ROWS.index(item.row) + 0.5) * CELL + rng.uniform(-2.5, 2.5)
        angle = rng.uniform(-0.3, 0.3)
        left, right = _reach(centre_x, radius)
        top, bottom = _reach(centre_y, radius)
        window = slice(top, bottom), slice(left, right)  # the pixels that the object can touch
        dx, dy = (X[window] - centre_x) / radius, (Y[window] - centre_y) / radius
        u = np.cos(angle) * dx + np.sin(angle) * dy  # the object's own axes, in radii
        v = -np.sin(angle) * dx + np.cos(angle) * dy
        distance = SIGNED_DISTANCE[item.shape](u, v) * radius  # pixels; negative inside
        inside = np.clip(0.5 - distance, 0, 1)[..., None]
        outline = np.clip(1.2 - np.abs(distance + 0.6), 0, 1)[..., None] * inside
        colour = np.array(RGB[item.colour], np.float32) * rng.uniform(0.92, 1.05)
        ink = _texture(item.texture, u * radius, v * radius)[..., None]
        surface = colour * (1 - 0.62 * ink) * (1 - 0.45 * outline)
        picture[window] = picture[window] * (1 - inside) + surface * inside
        rows, columns = np.nonzero(inside[..., 0] > 0.5)
        boxes[i, :2] = left + columns.min(), top + rows.min()
        boxes[i, 2:] = left + columns.max() + 1, top + rows.max() + 1
    direction = rng.uniform(0, 2 * np.pi)
    slope = (np.cos(direction) * (X - 32) + np.sin(direction) * (Y - 32)) / 32
    light = rng.uniform(0.75, 1.1) * (1 + rng.uniform(0, 0.18) * slope)
    picture = picture * light[..., None] + rng.normal(0, 7, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8), boxes


def _reach(centre: float, radius: float) -> tuple[int, int]:
    """The first pixel of a row or column that an object can touch, and the one after the last."""
    reach = EXTENT * radius
    return max(int(centre - reach), 0), min(int(centre + reach) + 1, IMAGE_SIZE)


def _background(x: Plane, y: Plane, rng: np.random.Generator) -> np.ndarray:
    """A dull ground with faint strokes and blobs, float32 [64, 64, 3]."""
    picture = np.empty((*x.shape, 3))
    picture[:] = rng.uniform(70, 150) + rng.uniform(-14, 14, 3)
    for _ in range(int(rng.integers(6, 12))):
        angle, offset = rng.uniform(0, np.pi), rng.uniform(0, IMAGE_SIZE)
        along = np.cos(angle) * (x - offset) + np.sin(angle) * (y - rng.uniform(0, IMAGE_SIZE))
        across = np.abs(-np.sin(angle) * (x - offset) + np.cos(angle) * (y - offset))
        mask = (across < rng.uniform(0.4, 1.6)) & (np.abs(along) < rng.uniform(4, 20))
        colour = rng.uniform(40, 190) + rng.uniform(-25, 25, 3)
        picture[mask] = 0.45 * picture[mask] + 0.55 * colour
    return picture.astype(np.float32)


def _texture(texture: str, u: Plane, v: Plane) -> Plane:
    """How much darker the surface is, 0 to 1, at (u, v) pixels from the object's centre."""
    if texture == "plain":
        return np.zeros_like(u)
    if texture == "striped":
        return (np.mod(v, 4.0) < 2.0).astype(np.float32)
    if texture == "dotted":
        return (np.hypot(np.mod(u, 4.4) - 2.2, np.mod(v, 4.4) - 2.2) < 1.35).astype(np.float32)
    return (np.mod(np.floor(u / 3.2) + np.floor(v / 3.2), 2) == 0).astype(np.float32)


def _polygon(corners: list[tuple[float, float]]) -> Callable[[Plane, Plane], Plane]:
    """Signed distance to a polygon: distance to its nearest edge, negative inside (even–odd)."""

    def distance(u: Plane, v: Plane) -> Plane:
        nearest = np.full_like(u, np.inf)
        inside = np.zeros(u.shape, bool)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            ex, ey = x1 - x0, y1 - y0
            along = np.clip(((u - x0) * ex + (v - y0) * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, np.hypot(u - x0 - along * ex, v - y0 - along * ey))
            if ey:  # a horizontal edge crosses no horizontal ray
                inside ^= ((y0 > v) != (y1 > v)) & (u < x0 + (v - y0) * ex / ey)
        return np.where(inside, -nearest, nearest)

    return distance


def _heart(u: Plane, v: Plane) -> Plane:
    """Two discs on a wedge."""
    discs = np.hypot(np.abs(u) - 0.47, v + 0.32) - 0.54
    return np.minimum(discs, _HEART_WEDGE(u, v))


_HEART_WEDGE = _polygon([(-0.92, -0.02), (0.0, -0.5), (0.92, -0.02), (0.0, 1.0)])
SIGNED_DISTANCE: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": lambda u, v: np.hypot(u, v) - 0.92,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.8,
    "triangle": _polygon([(0.0, -1.0), (0.98, 0.75), (-0.98, 0.75)]),
    "star": _polygon(
        [
            ((1.08 if k % 2 == 0 else 0.45) * np.sin(k * np.pi / 5),
             -(1.08 if k % 2 == 0 else 0.45) * np.cos(k * np.pi / 5))
            for k in range(10)
        ]
    ),
    "heart": _heart,
    "cross": lambda u, v: np.minimum(
        np.maximum(np.abs(u) - 0.3, np.abs(v) - 0.98),
        np.maximum(np.abs(u) - 0.98, np.abs(v) - 0.3),
    ),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.7) - 0.27,
    "diamond": lambda u, v: (np.abs(u) / 0.72 + np.abs(v) / 1.05 - 1) * 0.6,
    "moon": lambda u, v: np.maximum(np.hypot(u, v) - 0.98, 0.82 - np.hypot(u - 0.52, v)),
    "arrow": _polygon(
        [(1.05, 0), (0.2, -0.85), (0.2, -0.32), (-1, -0.32), (-1, 0.32), (0.2, 0.32), (0.2, 0.85)]
    ),
    "hexagon": lambda u, v: np.maximum(np.abs(u) * 0.866 + np.abs(v) * 0.5, np.abs(v)) - 0.84,
    "drop": lambda u, v: np.minimum(
        np.hypot(u, v - 0.3) - 0.65,
        np.maximum(np.abs(u) / 0.62 + (-v + 0.12) / 1.15 - 1, v - 0.12) * 0.5,
    ),
}  # fmt: skip
