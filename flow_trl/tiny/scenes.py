"""The tiny world's tasks: scenes of coloured shapes with GenEval metadata, and words; their prompts and pictures."""

import itertools
import random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..rewards.scene import RELATIONS, relations


SIZE = 32
SHAPES = ("circle", "square", "triangle")
COLORS = {
    "red": (220, 40, 40),
    "yellow": (240, 200, 30),
    "green": (50, 180, 60),
    "blue": (40, 80, 220),
    "purple": (150, 50, 190),
    "black": (30, 30, 30),
}
NUMBERS = {1: "a", 2: "two", 3: "three"}
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_SCALE = 4  # shapes are drawn this much larger and averaged down, for smooth edges


def _entry(shape: str, count: int = 1, color: str | None = None, position: list[str] | None = None) -> dict[str, Any]:
    return {"class": shape, "count": count, "color": color, "position": position}


def _scene_rows() -> list[tuple[tuple, dict[str, Any]]]:
    """All scenes as (content, row): rows that describe the same content in another order share the first item."""
    from ..prompts import describe

    scenes = []
    some_color = (None, *COLORS)
    for shape, count, color in itertools.product(SHAPES, NUMBERS, some_color):
        tag = "counting" if count > 1 else "colors" if color else "single_object"
        scenes.append((tag, [_entry(shape, count, color)]))
    pairs = [p for p in itertools.permutations(itertools.product(SHAPES, some_color), 2) if p[0][0] != p[1][0]]
    for (shape, color), (other, other_color) in pairs:
        tag = "color_attr" if color or other_color else "two_object"
        scenes.append((tag, [_entry(shape, 1, color), _entry(other, 1, other_color)]))
        for counts in ((1, 2), (2, 1), (2, 2)):
            include = [_entry(shape, counts[0], color), _entry(other, counts[1], other_color)]
            scenes.append(("counting", include))
        for relation in RELATIONS:
            include = [_entry(other, 1, other_color), _entry(shape, 1, color, [relation, "0"])]
            scenes.append(("position", include))
    rows = []
    for tag, include in scenes:
        things = [(e["class"], e["count"], e["color"] or "") for e in include]
        relation = include[-1]["position"][0] if tag == "position" else ""
        content = min((tag, *things, relation), (tag, *things[::-1], _OPPOSITE.get(relation, "")))
        exclude = [{"class": e["class"], "count": e["count"] + 1} for e in include] if tag == "counting" else None
        rows.append((content, {"prompt": describe(tag, include), "tag": tag, "include": include, "exclude": exclude}))
    return rows


def _word_rows() -> list[tuple[str, dict[str, str]]]:
    """5000 distinct random words in which consonants and vowels mostly alternate."""
    rng = random.Random(0)
    words: dict[str, None] = {}
    while len(words) < 5000:
        pattern = rng.choice(("cv", "vc", "cvc", "cvc", "vcv", "cvcv", "cvcc", "vccv", "cvcvc", "cvccv", "vcvcv"))
        letters = {"c": "BCDFGHJKLMNPQRSTVWXYZ", "v": "AEIOU"}
        words["".join(rng.choice(letters[kind]) for kind in pattern)] = None
    return [(word, {"prompt": f'the word "{word}"', "text": word}) for word in words]


def make_prompts(name: str, split: str):
    """The data set of `"scenes"` or `"words"`, see [`tiny.load_prompts`]."""
    from datasets import Dataset, Features, Value

    from ..prompts import GENEVAL_FEATURES

    if name == "words":
        rows, share, features = _word_rows(), 0.2, Features(prompt=Value("string"), text=Value("string"))
    else:
        rows, share, features = _scene_rows(), 0.45, GENEVAL_FEATURES
    rng = random.Random(0)
    contents: dict[str, list] = {}  # by tag; words have none
    for content in dict.fromkeys(content for content, _ in rows):
        contents.setdefault("" if name == "words" else content[0], []).append(content)
    held_out = {c for group in contents.values() for c in rng.sample(group, round(share * len(group)))}
    rows = [row for content, row in rows if (content in held_out) == (split == "test")]
    rng.shuffle(rows)
    return Dataset.from_list(rows, features=features)


def render_scene(include: list[dict[str, Any]], seed: int) -> Image.Image:
    """
    Draws a picture that satisfies the metadata of a scene, and shows nothing else.

    Objects do not overlap; what the metadata leaves open (size, place, colour, the light background) is random.

    Args:
        include (`list[dict]`):
            What to show, as in [`tiny.load_prompts`].
        seed (`int`):
            The picture is a function of `include` and `seed`.

    Returns:
        `PIL.Image.Image`: RGB, 32 x 32.

    Example:

    ```python
    >>> render_scene([{"class": "circle", "count": 2, "color": "red"}], seed=0).size
    (32, 32)
    ```
    """
    rng = random.Random(seed)
    wanted = [(index, entry) for index, entry in enumerate(include) for _ in range(entry["count"])]
    while True:
        placed: list[tuple[int, tuple[int, ...]]] = []
        for index, entry in wanted:
            side = rng.randint(8, 13 if len(wanted) < 3 else 10)
            left, top = (rng.randint(1, SIZE - 1 - side) for _ in "xy")
            box = (left, top, left + side, top + side)
            relation, target = entry.get("position") or (None, -1)
            apart = all(
                left >= b[2] + 2 or box[2] + 2 <= b[0] or top >= b[3] + 2 or box[3] + 2 <= b[1] for _, b in placed
            )
            if not (apart and all(relation in relations(box, b) for i, b in placed if i == int(target))):
                break
            placed.append((index, box))
        if len(placed) == len(wanted):
            break
    image = Image.new("RGB", (SIZE * _SCALE, SIZE * _SCALE), (rng.randint(236, 252),) * 3)
    draw = ImageDraw.Draw(image)
    for index, box in placed:
        left, top, right, bottom = (edge * _SCALE for edge in box)
        corners = [(left, top), (right - 1, bottom - 1)]
        fill = COLORS[include[index].get("color") or rng.choice(list(COLORS))]
        if include[index]["class"] == "circle":
            draw.ellipse(corners, fill=fill)
        elif include[index]["class"] == "square":
            draw.rectangle(corners, fill=fill)
        else:
            draw.polygon([((left + right - 1) / 2, top), (left, bottom - 1), corners[1]], fill=fill)
    return image.reduce(_SCALE)


def render_word(text: str, seed: int) -> Image.Image:
    """
    Draws a word, dark on light, 14 pixels high and at most 28 wide, a little off the centre.

    Args:
        text (`str`):
            2 to 5 capital letters.
        seed (`int`):
            The picture is a function of `text` and `seed`.

    Returns:
        `PIL.Image.Image`: RGB, 32 x 32.

    Example:

    ```python
    >>> render_word("CAT", seed=0).size
    (32, 32)
    ```
    """
    rng = random.Random(seed)
    image = Image.new("RGB", (SIZE, SIZE), (rng.randint(236, 252),) * 3)
    font = ImageFont.load_default(40)
    mask = Image.new("L", (40 * len(text), 80))
    ImageDraw.Draw(mask).text((mask.width / 2, 40), text, fill=255, font=font, anchor="mm", stroke_width=1)
    mask = mask.crop(mask.getbbox())
    mask = mask.resize((min(28, round(mask.width / 2)), 14), Image.Resampling.BOX)
    left, top = ((SIZE - side) // 2 + rng.randint(-1, 1) for side in mask.size)
    image.paste((rng.randint(10, 50),) * 3, (left, top), mask)
    return image


def to_array(images: list[Image.Image]) -> np.ndarray:
    """
    Stacks PIL images as RGB arrays of the tiny world's size.

    Args:
        images (`list[PIL.Image.Image]`):
            Images of any size and mode; other sizes are resized.

    Returns:
        `np.ndarray`: `uint8` of shape `(N, 32, 32, 3)`.

    Example:

    ```python
    >>> to_array([render_word("CAT", seed=0)]).shape
    (1, 32, 32, 3)
    ```
    """
    fitted = [i if i.size == (SIZE, SIZE) else i.resize((SIZE, SIZE), Image.Resampling.BOX) for i in images]
    return np.stack([np.asarray(image.convert("RGB")) for image in fitted])
