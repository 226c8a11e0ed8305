"""Finds the tiny world's shapes in images by plain image analysis, many images at once."""

import numpy as np
from PIL import Image

from ..rewards.scene import Detection
from .scenes import COLORS, SHAPES, SIZE, to_array


_FILL = np.array([np.pi / 4, 1.0, 0.5])  # share of its bounding box that a circle, square, triangle fills
_MIN_AREA = 12  # pixels; anything smaller is dirt


def _color_map(images: np.ndarray) -> np.ndarray:
    """
    Index of the nearest palette colour per pixel, -1 for background: `(N, H, W, 3)` -> `(N, H, W)`.

    Pixels at an edge mix colour and background, so each is compared with the line from the background (the median of
    the image's lightest pixels) to the colour, and belongs to the object if it is more than half way.
    """
    palette = np.array(list(COLORS.values()), np.float32)
    pixels = images.reshape(len(images), -1, 3).astype(np.float32)
    background = np.clip(np.percentile(pixels.min(-1), 75, axis=1), 220, 255).astype(np.float32)[:, None]
    pixels, lines = pixels - background[..., None], palette - background[..., None]  # (N, HW, 3), (N, colors, 3)
    squared = (lines**2).sum(-1)[:, None]
    dot = pixels @ lines.transpose(0, 2, 1)
    amount = np.clip(dot / squared, 0, 1.2)
    distance = amount**2 * squared - 2 * amount * dot  # squared distance to the line, but for a constant
    nearest = distance.argmin(-1)
    inside = np.take_along_axis(amount, nearest[..., None], -1)[..., 0] > 0.5
    return np.where(inside, nearest, -1).reshape(images.shape[:3])


def _components(colors: np.ndarray) -> np.ndarray:
    """Labels 4-connected regions of one colour by their smallest pixel index, -1 for background; over a batch."""
    n, height, width = colors.shape
    labels = np.arange(colors.size).reshape(colors.shape)
    same_row = (colors[:, :, 1:] == colors[:, :, :-1]) & (colors[:, :, 1:] >= 0)
    same_column = (colors[:, 1:] == colors[:, :-1]) & (colors[:, 1:] >= 0)
    while True:
        before = labels.copy()
        for axis, same in ((2, same_row), (1, same_column)):
            view = np.moveaxis(labels, axis, 1)
            same = np.moveaxis(same, axis, 1)
            low = np.where(same, np.minimum(view[:, 1:], view[:, :-1]), view[:, 1:])
            view[:, 1:] = low
            view[:, :-1] = np.where(same, np.minimum(view[:, :-1], low), view[:, :-1])
        labels = labels.ravel()[labels]  # jump to the label of the pixel that the label names
        if np.array_equal(labels, before):
            return np.where(colors >= 0, labels, -1)


def detect_shapes(images: list[Image.Image]) -> list[list[Detection]]:
    """
    Finds circles, squares and triangles in the six colours of the tiny world.

    Each pixel gets the nearest colour of the palette, or none; connected pixels of one colour are an object, whose
    shape follows from the share of its bounding box that it fills (triangle 1/2, circle pi/4, square 1).

    Args:
        images (`list[PIL.Image.Image]`):
            Images with a light background; other sizes than 32 x 32 are resized to that.

    Returns:
        `list[list[Detection]]`: the objects of each image. Boxes are in pixels of the 32 x 32 image; the score is 1
        for a perfect shape, 0 half-way between two shapes.

    Example:

    ```python
    >>> from flow_trl.tiny.scenes import render_scene
    >>> [d.label for d in detect_shapes([render_scene([{"class": "circle", "count": 1}], seed=0)])[0]]
    ['circle']
    ```
    """
    found: list[list[Detection]] = [[] for _ in images]
    if not found:
        return found
    colors = _color_map(to_array(images))
    labels = _components(colors).ravel()
    pixels = np.flatnonzero(labels >= 0)
    pixels = pixels[np.argsort(labels[pixels], kind="stable")]
    if not len(pixels):
        return found
    names, starts, areas = np.unique(labels[pixels], return_index=True, return_counts=True)
    y, x = pixels // SIZE % SIZE, pixels % SIZE
    left, right = np.minimum.reduceat(x, starts), np.maximum.reduceat(x, starts) + 1
    top, bottom = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts) + 1
    distance = np.abs(areas / ((right - left) * (bottom - top)) - _FILL[:, None])  # (shapes, objects)
    nearest, second = np.sort(distance, axis=0)[:2]
    scores = (second - nearest) / (second + nearest)
    palette = list(COLORS)
    for i in np.flatnonzero(areas >= _MIN_AREA):
        box = tuple(float(edges[i]) for edges in (left, top, right, bottom))
        color = palette[colors.ravel()[names[i]]]
        found[names[i] // SIZE**2].append(Detection(SHAPES[distance[:, i].argmin()], color, box, float(scores[i])))
    return found
