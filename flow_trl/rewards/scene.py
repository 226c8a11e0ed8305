"""GenEval (https://huggingface.co/papers/2310.11513): do the objects found in an image match a scene's metadata?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from . import refuse_videos


if TYPE_CHECKING:
    import torch

    from .clip import ClipEncoder


@dataclass
class Detection:
    """
    One object found in an image.

    Args:
        label (`str`):
            Class name, for example `"circle"` or `"wine glass"`.
        color (`str` or `None`):
            Colour name, `None` if the detector does not tell colours.
        box (`tuple[float, float, float, float]`):
            Left, top, right and bottom edge in pixels.
        score (`float`, *optional*, defaults to `1.0`):
            Confidence in [0, 1].

    Example:

    ```python
    >>> Detection("circle", "red", (3.0, 4.0, 13.0, 14.0), 0.9)
    Detection(label='circle', color='red', box=(3.0, 4.0, 13.0, 14.0), score=0.9)
    ```
    """

    label: str
    color: str | None
    box: tuple[float, float, float, float]
    score: float = 1.0


Detector = Callable[[list[Image.Image]], list[list[Detection]]]

RELATIONS = ("left of", "right of", "above", "below")
MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
# GenEval's colours, the phrases by which CLIP tells them, and what an object's surroundings are painted over with.
GENEVAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOR_PHRASES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
BACKGROUND = "#999"
# Pairs of query and class that are looked at, and objects that are kept of a class, as in GenEval.
MAX_CANDIDATES, MAX_PER_CLASS = 100, 16
STRIDE = 32  # of the model, to a multiple of which images are padded
# GenEval's names of COCO classes that detectors name otherwise.
GENEVAL_CLASSES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


def relations(box: tuple[float, ...], other: tuple[float, ...]) -> set[str]:
    """
    Names where a box lies relative to another, by GenEval's rule (https://huggingface.co/papers/2310.11513).

    The offset between the centres is shrunk along each axis by a tenth of the two extents; a direction holds if what
    remains along it is over half of the whole offset. Up to two directions hold (a diagonal), or none.

    Args:
        box (`tuple[float, float, float, float]`):
            Left, top, right, bottom of the box in question; y grows downwards.
        other (`tuple[float, float, float, float]`):
            The box it is compared with.

    Returns:
        `set[str]`: a subset of `RELATIONS`: `"left of"`, `"right of"`, `"above"`, `"below"`.

    Example:

    ```python
    >>> relations((0, 0, 10, 10), (20, 0, 30, 10))
    {'left of'}
    ```
    """
    a, b = np.asarray(box, float).reshape(2, 2), np.asarray(other, float).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    margin = 0.1 * (np.ptp(a, axis=0) + np.ptp(b, axis=0))
    offset, length = np.sign(offset) * np.maximum(np.abs(offset) - margin, 0), np.linalg.norm(offset)
    if (np.abs(offset) < 1e-3).all():
        return set()
    x, y = offset / length
    return {name for name, amount in zip(RELATIONS, (-x, x, -y, y), strict=True) if amount > 0.5}


def score_scene(
    detections: list[Detection],
    include: list[dict[str, Any]],
    exclude: list[dict[str, Any]] | None = None,
    strict: bool = False,
) -> float:
    """
    Compares what was found in an image with GenEval metadata.

    The strict score is GenEval's: 1 if every entry of `include` has at least `count` objects of its class, the `count`
    most confident of which have its colour and stand in its position to the matched objects of the entry that it
    refers to, and no entry of `exclude` has `count` objects or more; else 0.

    The graded score is the mean of parts, as in Flow-GRPO (https://huggingface.co/papers/2505.05470). Each entry of
    `include` has a part `max(0, 1 - |found - count| / count)`; if it names a colour, the share of its objects that have
    it; if it names a position, the share of the pairs of objects that stand so. The latter two are 0 unless the number
    of objects is right (for a position also the number of those it refers to). Surplus objects cost here already, so
    `exclude` is not used.

    Args:
        detections (`list[Detection]`):
            The objects of one image.
        include (`list[dict]`):
            Entries with `class`, `count` and optionally `color` and `position`. The latter is GenEval's
            `["left of", 0]`, relation and index of an earlier entry; the index can be a string, which lets a
            `datasets.Dataset` hold the pair. Missing keys and `None` mean the same.
        exclude (`list[dict]`, *optional*):
            Entries with `class` and `count`.
        strict (`bool`, *optional*, defaults to `False`):
            Whether the score is the strict one.

    Returns:
        `float`: 0 or 1 if strict, else in [0, 1].

    Raises:
        ValueError: if a position is no such relation, or refers to an entry that does not come earlier.

    Example:

    ```python
    >>> found = [Detection("circle", "red", (0, 0, 10, 10)), Detection("square", "blue", (20, 0, 30, 10))]
    >>> include = [{"class": "circle", "count": 1, "color": "green"}, {"class": "square", "count": 1}]
    >>> score_scene(found, include, strict=True), score_scene(found, include)
    (0.0, 0.6666666666666666)
    ```
    """
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        found.setdefault(detection.label, []).append(detection)
    matched: list[list[Detection]] = []  # per entry, empty if it is not satisfied
    parts, correct = [], True
    for index, entry in enumerate(include):
        count, objects = int(entry["count"]), found.get(entry["class"], [])
        chosen = objects[:count]
        complete = len(chosen) == count if strict else len(objects) == count
        parts.append(max(0.0, 1 - abs(len(objects) - count) / count))
        satisfied = complete
        if entry.get("color") is not None:
            share = np.mean([d.color == entry["color"] for d in chosen]) if complete else 0.0
            parts.append(float(share))
            satisfied = satisfied and (share == 1 or not strict)
        if entry.get("position") is not None:
            relation, target = entry["position"]
            if relation not in RELATIONS:
                raise ValueError(
                    f"`position` of entry {index} of `include` is {entry['position']!r}: its first item must be one of "
                    f"{', '.join(map(repr, RELATIONS))}."
                )
            if not 0 <= int(target) < index:
                raise ValueError(
                    f"`position` of entry {index} of `include` is {entry['position']!r}: its second item must be the "
                    f"index of an earlier entry, between 0 and {index - 1}."
                )
            pairs = [(a, b) for a in chosen for b in matched[int(target)]] if satisfied else []
            share = np.mean([relation in relations(a.box, b.box) for a, b in pairs]) if pairs else 0.0
            parts.append(float(share))
            satisfied = satisfied and share == 1
        matched.append(chosen if satisfied else [])
        correct = correct and satisfied
    if not strict:
        return float(np.mean(parts))
    return float(correct and all(len(found.get(e["class"], [])) < e["count"] for e in exclude or []))


class SceneReward:
    """
    Reward for scenes described by GenEval metadata: a detector finds objects, [`score_scene`] compares.

    With `strict=True` and a [`TransformersDetector`], which is the built-in reward `"geneval_strict"`, it is GenEval's
    evaluation of an image; GenEval's overall score is the mean over the tags of the means over their images.

    Args:
        detector (`Callable`):
            Maps a list of PIL images to a list of lists of [`Detection`]: [`TransformersDetector`] for photos,
            [`~flow_trl.tiny.detector.detect_shapes`] for the tiny world.
        strict (`bool`, *optional*, defaults to `False`):
            Whether to return GenEval's strict accuracy, 0 or 1, rather than the graded score in [0, 1].
        name (`str`, *optional*):
            Name under which the reward is logged. Defaults to `"scene_strict"` if strict, else `"scene"`.

    Raises:
        TypeError: if `detector` is missing or no callable.

    Example:

    ```python
    >>> from flow_trl.tiny import load_prompts
    >>> from flow_trl.tiny.detector import detect_shapes
    >>> from flow_trl.tiny.scenes import render_scene
    >>> row = load_prompts("scenes", "test")[0]
    >>> image = render_scene(row["include"], seed=0)
    >>> SceneReward(detect_shapes)(prompts=[row["prompt"]], images=[image], include=[row["include"]])
    [1.0]
    ```
    """

    takes_videos = False

    def __init__(self, detector: Detector | None = None, strict: bool = False, name: str | None = None):
        if not callable(detector):
            raise TypeError(
                f"`detector` is {detector!r}: pass a function that finds objects in images, `TransformersDetector()` "
                "for photos or `flow_trl.tiny.detector.detect_shapes` for the tiny world."
            )
        self.detector = detector
        self.strict = strict
        self.__name__ = name or ("scene_strict" if strict else "scene")

    def __call__(
        self,
        prompts: list[str] | None = None,
        images: list[Image.Image] | None = None,
        include: list[list[dict[str, Any]] | None] | None = None,
        exclude: list[list[dict[str, Any]] | None] | None = None,
        tag: list[str | None] | None = None,
        **columns,
    ) -> list[float | None]:
        """
        Scores images of any size, see [`flow_trl.rewards`]; prompts are not used.

        Args:
            include (`list[list[dict] | None]`):
                Per image what it must show, see [`score_scene`]; `None` where the reward does not apply.
            exclude (`list[list[dict] | None]`, *optional*):
                Per image what it must not show.
            tag (`list[str | None]`, *optional*):
                GenEval's kind of each row. Where it is `"counting"`, only objects whose score is above the detector's
                `counting_threshold` count, if it has one.

        Returns:
            `list[float | None]`: one score per image in [0, 1], `None` where `include` is `None`.

        Raises:
            ValueError: if `include` is missing, or if an image is a video.
        """
        if include is None:
            raise ValueError(
                f"The reward `{self.__name__}` needs a column `include` in the dataset, which is missing. Give every "
                'row GenEval metadata such as [{"class": "circle", "count": 1, "color": "red"}], or None where the '
                'reward does not apply; `flow_trl.tiny.load_prompts("scenes", "train")` has such rows.'
            )
        refuse_videos(self.__name__, images)
        applies = [i for i, entries in enumerate(include) if entries is not None]
        scores: list[float | None] = [None] * len(include)
        detections = self.detector([images[i] for i in applies]) if applies else []
        counting_threshold = getattr(self.detector, "counting_threshold", None)
        for i, objects in zip(applies, detections, strict=True):
            if counting_threshold is not None and tag and tag[i] == "counting":
                objects = [found for found in objects if found.score > counting_threshold]
            scores[i] = score_scene(objects, include[i], exclude[i] if exclude else None, self.strict)
        return scores


class TransformersDetector:
    """
    Finds objects in photos and tells their colours as [GenEval](https://huggingface.co/papers/2310.11513) does.

    Objects are the masks of a Mask2Former with a Swin-S backbone trained on COCO, on the image with its shorter edge resized
    to 800 pixels: of the 100 likeliest pairs of mask and class those whose score (the class's probability times the mean
    probability of the mask's pixels) is above `threshold`, at most 16 of a class, overlapping or not. Classes get
    GenEval's names ("keyboard" becomes "computer keyboard"). The colour of an object is asked of a CLIP when it is needed:
    of ten, the one whose three phrases (such as "a photo of a red-colored apple") are nearest to the object's box, in
    which everything but the object is grey. GenEval takes mmdetection's training of this network and transformers has its
    authors', so that a few images are judged differently.

    Args:
        model (`str` or `Path`, *optional*, defaults to `"facebook/mask2former-swin-small-coco-instance"`):
            Hub id or folder of a [`~transformers.Mask2FormerForUniversalSegmentation`] and its image processor.
        clip (`str`, `Path` or [`~rewards.clip.ClipEncoder`], *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            The CLIP that tells colours, GenEval's by default.
        threshold (`float`, *optional*, defaults to `0.3`):
            Confidence above which an object is found.
        counting_threshold (`float`, *optional*, defaults to `0.9`):
            Confidence above which it counts for a [`SceneReward`] in rows whose column `tag` is `"counting"`.
        shortest_edge (`int`, *optional*, defaults to `800`):
            What the shorter edge is resized to; a smaller number is faster, and no longer GenEval's.
        device (`str` or `torch.device`, *optional*):
            Where the models run. Defaults to this process's GPU if there is one, else the CPU.
        batch_size (`int`, *optional*, defaults to `8`):
            Images per forward pass.

    Raises:
        ValueError: if no such model, or no CLIP, can be loaded.
        MissingExtraError: if scipy is not installed, which transformers needs for Mask2Former.

    Example:

    ```python
    >>> reward = SceneReward(TransformersDetector(device="cuda"))
    >>> reward(
    ...     prompts=["a photo of two wine glasses"],
    ...     images=[image],
    ...     include=[[{"class": "wine glass", "count": 2}]],
    ...     tag=["counting"],
    ... )
    [0.5]
    ```
    """

    def __init__(
        self,
        model: str | Path = MASK2FORMER,
        clip: str | Path | ClipEncoder | None = None,
        *,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        shortest_edge: int = 800,
        device: str | torch.device | None = None,
        batch_size: int = 8,
    ):
        from .clip import OPENAI_CLIP, ClipEncoder

        self.model, self.processor = _load_mask2former(model, shortest_edge, device)
        self.clip = clip if isinstance(clip, ClipEncoder) else ClipEncoder(clip or OPENAI_CLIP, device=device)
        self.threshold, self.counting_threshold = threshold, counting_threshold
        self.batch_size = batch_size
        self._phrases: dict[str, torch.Tensor] = {}

    def __call__(self, images: list[Image.Image]) -> list[list[Detection]]:
        """Finds the objects in each of some images, of any size: the most confident first, boxes in the image's pixels."""
        import torch

        found: list[list[Detection]] = []
        for _, group in groupby((image.convert("RGB") for image in images), key=lambda image: image.size):
            group = list(group)
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                pixels = self.processor(images=batch, return_tensors="pt").pixel_values.to(self.model.device)
                height, width = pixels.shape[-2:]
                with torch.no_grad():
                    outputs = self.model(torch.nn.functional.pad(pixels, (0, -width % STRIDE, 0, -height % STRIDE)))
                for one in zip(batch, outputs.class_queries_logits, outputs.masks_queries_logits, strict=True):
                    found.append(self._objects(*one, height, width))
        return found

    def _objects(
        self, image: Image.Image, classes: torch.Tensor, masks: torch.Tensor, height: int, width: int
    ) -> list[Detection]:
        """Objects by each query's logits of classes, and of pixels of the padded image, of which `height` x `width` is it."""
        from torch.nn.functional import interpolate

        likely = classes.float().softmax(-1)[:, :-1]
        scores, pairs = likely.flatten().topk(min(MAX_CANDIDATES, likely.numel()))
        scores, pairs = scores[scores > self.threshold], pairs[scores > self.threshold]
        if not len(scores):
            return []
        masks = masks[pairs // likely.shape[1]][None].float()
        padded = height + -height % STRIDE, width + -width % STRIDE
        masks = interpolate(masks, padded, mode="bilinear")[..., :height, :width]
        masks = interpolate(masks, image.size[::-1], mode="bilinear")[0]
        shapes = masks > 0
        scores = scores * (masks.sigmoid() * shapes).sum((1, 2)) / (shapes.sum((1, 2)) + 1e-6)
        found: dict[str, list[Detection]] = {}
        for i in scores.argsort(descending=True).tolist():
            label = self.model.config.id2label[int(pairs[i]) % likely.shape[1]]
            label = GENEVAL_CLASSES.get(label, label)
            objects = found.setdefault(label, [])
            if scores[i] > self.threshold and len(objects) < MAX_PER_CLASS:
                objects.append(_Found(label, float(scores[i]), Image.fromarray(shapes[i].cpu().numpy()), image, self))
        return sorted((one for objects in found.values() for one in objects), key=lambda one: -one.score)

    def _color(self, label: str, cut: Image.Image) -> str:
        import torch

        with torch.no_grad():
            if label not in self._phrases:
                phrases = [phrase.format(color=c, label=label) for c in GENEVAL_COLORS for phrase in COLOR_PHRASES]
                each = torch.nn.functional.normalize(self.clip.embed_texts(phrases))
                means = each.unflatten(0, (len(GENEVAL_COLORS), -1)).mean(1)
                self._phrases[label] = torch.nn.functional.normalize(means)
            likeness = self._phrases[label] @ self.clip.embed_images([cut])[0]
        return GENEVAL_COLORS[int(likeness.argmax())]


class _Found(Detection):
    """An object whose colour its detector tells when it is asked for."""

    def __init__(
        self, label: str, score: float, mask: Image.Image, image: Image.Image, detector: TransformersDetector
    ):
        self.label, self.score, self.box = label, score, tuple(map(float, mask.getbbox()))
        self._mask, self._image, self._detector = mask, image, detector

    @cached_property
    def color(self) -> str:
        cut = Image.composite(self._image, Image.new("RGB", self._image.size, BACKGROUND), self._mask)
        return self._detector._color(self.label, cut.crop(self.box))


def _load_mask2former(model: str | Path, shortest_edge: int, device: str | torch.device | None) -> tuple[Any, Any]:
    from accelerate import PartialState
    from transformers import AutoImageProcessor, Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    from ..utils import import_extra
    from .pretrained import load_config, loading

    import_extra("scipy", extra="geneval", purpose="Mask2Former")
    size = {"shortest_edge": shortest_edge, "longest_edge": shortest_edge * 1333 // 800}
    others = (
        "or a folder that `save_pretrained` has written. For pictures of the tiny world no model is needed: pass "
        "`flow_trl.tiny.scene_reward()` as the reward function"
    )
    with loading(model, "Mask2Former", MASK2FORMER, others):
        config = load_config(model, Mask2FormerConfig)
        processor = AutoImageProcessor.from_pretrained(model, size=size, size_divisor=0)
        loaded = Mask2FormerForUniversalSegmentation.from_pretrained(model, config=config)
        return loaded.to(PartialState().device if device is None else device).eval(), processor
