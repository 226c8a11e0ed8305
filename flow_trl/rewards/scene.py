"""GenEval-style reward: do the objects found in an image match a scene's metadata?"""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from . import refuse_videos
from .clip import OPENAI_CLIP, ClipEncoder


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
        mask (`PIL.Image.Image`, *optional*):
            Of the image's size, of mode `"L"`: 255 where the object is, else 0.

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
    mask: Image.Image | None = field(default=None, repr=False, compare=False)


Detector = Callable[[list[Image.Image]], list[list[Detection]]]

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16  # of a class in an image, the most confident ones
GENEVAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# What CLIP compares a crop with, for each colour the mean of the three.
COLOR_PHRASES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
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
        `set[str]`: a subset of `{"left of", "right of", "above", "below"}`.

    Example:

    ```python
    >>> relations((0, 0, 10, 10), (20, 0, 30, 10))
    {'left of'}
    ```
    """
    a, b = np.asarray(box, float).reshape(2, 2), np.asarray(other, float).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    margin = 0.1 * (np.ptp(a, axis=0) + np.ptp(b, axis=0))
    x, y = np.sign(offset) * np.maximum(np.abs(offset) - margin, 0) / max(float(np.linalg.norm(offset)), 1e-9)
    return {name for name, amount in (("left of", -x), ("right of", x), ("above", -y), ("below", y)) if amount > 0.5}


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
        ValueError: if a position refers to an entry that does not come earlier.

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

    Args:
        detector (`Callable`):
            Maps a list of PIL images to a list of lists of [`Detection`]: [`TransformersDetector`] for photos,
            [`~flow_trl.tiny.detector.detect_shapes`] for the tiny world. Two attributes are used where it has them:
            `counting_threshold`, the confidence below which objects do not count for prompts with the `tag` `"counting"`,
            and `name_colors`, which gets a list of an image and a detection each and sets the colours of the latter.
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
        Scores images.

        Args:
            prompts (`list[str]`, *optional*):
                Not used; here because every image reward gets them.
            images (`list[PIL.Image.Image]`):
                Images of any size.
            include (`list[list[dict] | None]`):
                Per image what it must show, see [`score_scene`]; `None` where the reward does not apply.
            exclude (`list[list[dict] | None]`, *optional*):
                Per image what it must not show.
            tag (`list[str | None]`, *optional*):
                Per image the kind of its prompt, of which `"counting"` has a threshold of its own.
            columns:
                Other columns of the dataset, ignored.

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
        surely = getattr(self.detector, "counting_threshold", 0.0)
        detections = [
            [found for found in objects if found.score > surely] if tag and tag[i] == "counting" else objects
            for i, objects in zip(applies, detections, strict=True)
        ]
        if name_colors := getattr(self.detector, "name_colors", None):
            name_colors(
                [
                    (images[i], found)
                    for i, objects in zip(applies, detections, strict=True)
                    for entry in include[i]
                    if entry.get("color") is not None
                    for found in sorted(objects, key=lambda found: -found.score)
                    if found.label == entry["class"]
                ]
            )
        for i, objects in zip(applies, detections, strict=True):
            scores[i] = score_scene(objects, include[i], exclude[i] if exclude else None, self.strict)
        return scores


class TransformersDetector:
    """
    Finds objects in photos as [GenEval](https://huggingface.co/papers/2310.11513) does: with an instance segmentation
    model of transformers, and a CLIP that tells the colours where they are asked for.

    The default model is Mask2Former with GenEval's backbone, Swin-S, trained on COCO's 80 classes (GenEval runs that of
    mmdetection; in transformers it needs scipy). Classes get GenEval's names ("keyboard" becomes "computer keyboard").
    At most 16 objects of a class are kept, those of the highest confidence. The colour of an object is the one of ten
    whose phrases are nearest to the image in its box, grey (`#999`) outside of its mask.

    Args:
        model (`str`, `Path` or [`~transformers.ImageSegmentationPipeline`], *optional*):
            Hub id or folder of an instance segmentation model, or a pipeline with one. Defaults to
            `"facebook/mask2former-swin-small-coco-instance"`.
        color_model (`str`, `Path` or [`~transformers.CLIPModel`], *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            The CLIP that tells colours, see [`~rewards.clip.ClipEncoder`].
        color_processor (`str`, `Path` or [`~transformers.CLIPProcessor`], *optional*):
            Its processor. Defaults to the one beside it.
        threshold (`float`, *optional*, defaults to `0.3`):
            Confidence above which an object counts.
        counting_threshold (`float`, *optional*, defaults to `0.9`):
            The same for prompts with the `tag` `"counting"`.
        device (`str` or `torch.device`, *optional*):
            Where the models run; that of a pipeline stays where it is. Defaults to this process's GPU if there is one,
            else the CPU.
        batch_size (`int`, *optional*, defaults to `8`):
            Images per forward pass.

    Raises:
        ValueError: if a model cannot be loaded, or finds no instances.

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
        model: Any = MASK2FORMER,
        color_model: Any = OPENAI_CLIP,
        color_processor: Any = None,
        *,
        threshold: float = 0.3,
        counting_threshold: float = COUNTING_THRESHOLD,
        device: Any = None,
        batch_size: int = 8,
    ):
        pipeline = _load_pipeline(str(model), device) if isinstance(model, str | Path) else model
        self.model, self.processor = pipeline.model.eval(), pipeline.image_processor
        self.encoder = ClipEncoder(color_model, color_processor, device=device)
        self.threshold = threshold
        self.counting_threshold = counting_threshold
        self.batch_size = batch_size
        self._classifiers: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> list[list[Detection]]:
        """
        Finds the objects in images.

        Args:
            images (`list[PIL.Image.Image]`):
                Images of any size.

        Returns:
            `list[list[Detection]]`: the objects of each image by falling confidence, boxes in its pixels, with masks and
            without colours.
        """
        found = []
        for start in range(0, len(images), self.batch_size):
            batch = [image.convert("RGB") for image in images[start : start + self.batch_size]]
            inputs = self.processor(images=batch, return_tensors="pt").to(self.model.device)
            segments = self.processor.post_process_instance_segmentation(
                self.model(**inputs),
                threshold=self.threshold,
                target_sizes=[(image.height, image.width) for image in batch],
                return_binary_maps=True,
            )
            found += [self._read(image["segmentation"], image["segments_info"]) for image in segments]
        return found

    def _read(self, masks: torch.Tensor, objects: list[dict[str, Any]]) -> list[Detection]:
        detections, count = [], Counter()
        for mask, item in sorted(zip(masks, objects, strict=False), key=lambda pair: -pair[1]["score"]):
            name = self.model.config.id2label[item["label_id"]]
            count[name] += 1
            if item["score"] <= self.threshold or count[name] > MAX_OBJECTS:
                continue
            image = Image.fromarray(255 * mask.cpu().numpy().astype(np.uint8))
            box = tuple(map(float, image.getbbox()))
            detections.append(Detection(GENEVAL_CLASSES.get(name, name), None, box, item["score"], image))
        return detections

    @torch.no_grad()
    def name_colors(self, objects: list[tuple[Image.Image, Detection]]) -> None:
        """
        Sets the colours of objects, each the likeliest of GenEval's ten.

        Args:
            objects (`list[tuple[PIL.Image.Image, Detection]]`):
                Objects that this detector has found, each with its image.
        """
        for start in range(0, len(objects), self.encoder.batch_size):
            batch = objects[start : start + self.encoder.batch_size]
            crops = []
            for image, detection in batch:
                grey = Image.new("RGB", image.size, "#999")
                crops.append(Image.composite(image.convert("RGB"), grey, detection.mask).crop(detection.box))
            embeddings = self.encoder.embed_images(crops)
            for (_, detection), embedding in zip(batch, embeddings, strict=True):
                detection.color = GENEVAL_COLORS[int((self._classifier(detection.label) @ embedding).argmax())]

    def _classifier(self, label: str) -> torch.Tensor:
        """Directions of the ten colours of a class, (10, dim)."""
        if label not in self._classifiers:
            phrases = [phrase.format(color=color, label=label) for color in GENEVAL_COLORS for phrase in COLOR_PHRASES]
            directions = F.normalize(self.encoder.embed_texts(phrases), dim=-1)
            means = directions.view(len(GENEVAL_COLORS), len(COLOR_PHRASES), -1).mean(dim=1)
            self._classifiers[label] = F.normalize(means, dim=-1)
        return self._classifiers[label]


def _load_pipeline(model: str, device: Any) -> Any:
    from accelerate import PartialState
    from transformers import pipeline

    device = PartialState().device if device is None else device
    try:
        loaded = pipeline("image-segmentation", model=model, device=device)
        finds = getattr(loaded.image_processor, "post_process_instance_segmentation", None)
        if finds and "return_binary_maps" in inspect.signature(finds).parameters:
            return loaded
        error = f"{type(loaded.model).__name__} finds no instances"
    except (OSError, ValueError) as failure:
        error = failure
    raise ValueError(
        f'`model` is "{model}", from which no instance segmentation model can be loaded ({error}). Pass the Hub id of '
        f'one, such as "{MASK2FORMER}" (downloaded the first time, for which the network is needed), a folder that '
        "`save_pretrained` has written, or a `transformers.ImageSegmentationPipeline`. For pictures of the tiny world "
        "no model is needed: pass `flow_trl.tiny.scene_reward()` as the reward function."
    ) from (error if isinstance(error, Exception) else None)
