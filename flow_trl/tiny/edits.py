"""The tiny world's editing task: a picture of two shapes, one of which gets another colour and both keep their place."""

import random
from typing import Any

from PIL import Image

from . import load_prompts
from .detector import detect_shapes
from .scenes import COLORS, render_scene


Box = tuple[float, float, float, float]


def load_edits(split: str = "train"):
    """
    Makes the rows of the editing task; the same ones every time.

    What is asked for are the scenes with two coloured shapes of [`load_prompts("scenes", split)`][`load_prompts`], so what is
    held out is in no train row. Each comes with eight pictures in which one of the two has another colour.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"test"`.

    Returns:
        `datasets.Dataset`: in random order, with the columns `prompt` (what shall be seen), `image` (what is to be
        edited, 32 x 32), `include` (the two shapes, as in [`load_prompts`]) and `places` (the boxes in which they are).

    Example:

    ```python
    >>> load_edits("test")[0]["prompt"]
    'a photo of a black circle and a red triangle'
    ```
    """
    from datasets import Features, Image, List, Value

    rng, rows = random.Random(0), []
    scenes = load_prompts("scenes", split)
    for row in scenes:
        if row["tag"] != "color_attr" or not all(entry["color"] for entry in row["include"]):
            continue
        for variant in range(8):
            before = [dict(entry) for entry in row["include"]]
            changed = before[variant % 2]
            changed["color"] = rng.choice([color for color in COLORS if color != changed["color"]])
            image = render_scene(before, seed=rng.randrange(2**31))
            found = {detection.label: list(detection.box) for detection in detect_shapes([image])[0]}
            places = [found[entry["class"]] for entry in before]
            rows.append({"prompt": row["prompt"], "image": image, "include": row["include"], "places": places})
    rng.shuffle(rows)
    features = Features(
        prompt=Value("string"),
        image=Image(),
        include=scenes.features["include"],
        places=List(List(Value("float32"))),
    )
    return type(scenes).from_list(rows, features=features)


def overlap(box: Box, other: Box) -> float:
    """
    Intersection over union of two boxes (left, top, right, bottom).

    Example:

    ```python
    >>> overlap((0, 0, 2, 2), (1, 0, 3, 2))
    0.3333333333333333
    ```
    """
    width, height = (min(box[i + 2], other[i + 2]) - max(box[i], other[i]) for i in (0, 1))
    shared = max(0, width) * max(0, height)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return shared / (sum(areas) - shared)


class EditReward:
    """
    The reward for results of [`load_edits`]: are the right shapes in the right colours where they were?

    The graded score is the mean over the shapes of the overlap of their box with the place, halved if the colour is wrong. The
    strict one is 1 if nothing else is seen, the colours are right, and each box overlaps its place by at least a half.

    Args:
        strict (`bool`, *optional*, defaults to `False`):
            Whether to return the strict score, 0 or 1, rather than the graded one in [0, 1].

    Example:

    ```python
    >>> row = load_edits("test")[0]
    >>> EditReward(strict=True)(images=[row["image"]], include=[row["include"]], places=[row["places"]])
    [0.0]
    ```
    """

    def __init__(self, strict: bool = False):
        self.strict, self.__name__ = strict, "edit_strict" if strict else "edit"

    def __call__(
        self, images: list[Image.Image], include: list[list[dict[str, Any]]], places: list[list[Box]], **kwargs: Any
    ) -> list[float]:
        scores = []
        for detections, entries, boxes in zip(detect_shapes(images), include, places, strict=True):
            found = [
                max(((overlap(d.box, box), d.color == entry["color"]) for d in detections if d.label == entry["class"]),
                    default=(0.0, False))
                for entry, box in zip(entries, boxes, strict=True)
            ]  # fmt: skip
            if self.strict:
                right = len(detections) == len(entries) and all(share >= 0.5 and color for share, color in found)
                scores.append(float(right))
            else:
                scores.append(sum(share * (1.0 if color else 0.5) for share, color in found) / len(found))
        return scores
