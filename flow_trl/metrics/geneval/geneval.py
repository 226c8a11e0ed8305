"""GenEval: do images show the objects that were asked for, as a module for `evaluate`."""

from collections import defaultdict

import datasets
import evaluate

from flow_trl.metrics import summarize
from flow_trl.rewards.scene import COUNTING_THRESHOLD, Detection, SceneReward, TransformersDetector


_DESCRIPTION = """\
Says of how many images the objects, counts, colours and positions are those that were asked for: GenEval's accuracy of each
kind of prompt, and the mean over the kinds.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[PIL.Image.Image]` or `list[list[dict]]`):
        Images, in which Mask2Former finds the objects and CLIP tells their colours
        ([`~flow_trl.rewards.scene.TransformersDetector`]), or the objects that were found in each image: dictionaries with
        `label`, `color` (or `None`), `box` (left, top, right, bottom) and `score`.
    include (`list[list[dict]]`):
        Of each image the objects it must show, GenEval's metadata: `class`, `count`, and where it matters `color` and
        `position`.
    tags (`list[str]`):
        The kind of each prompt, GenEval's `tag`: `"single_object"`, `"two_object"`, `"counting"`, `"colors"`,
        `"position"` or `"color_attr"`, or others of your own.
    exclude (`list[list[dict] | None]`, *optional*):
        Of each image what it must not show, as `class` and `count`.
    detector (`str` or `Callable`, *optional*):
        Hub id or folder of an instance segmentation model, or a function from images to detections, in place of GenEval's.
    color_model (`str`, *optional*):
        Hub id or folder of the CLIP that tells colours, in place of GenEval's.

Returns:
    `dict[str, float]`:

    - `overall`: mean over the kinds of prompts, in [0, 1], and `overall_se`, from theirs.
    - `{tag}` for each kind: share of its images that are right, and `{tag}_se`, std / sqrt(number of images); `None` for one.

Raises:
    ValueError: if there are no images, the inputs differ in length, or a model cannot be loaded.

Examples:

    >>> metric = flow_trl.metrics.load("geneval")
    >>> dog = {"label": "dog", "color": None, "box": [10, 10, 60, 60], "score": 0.95}
    >>> metric.compute(
    ...     predictions=[[dog], [dog]],
    ...     include=[[{"class": "dog", "count": 1}], [{"class": "dog", "count": 2}]],
    ...     tags=["single_object", "counting"],
    ... )
    {'overall': 0.5, 'overall_se': None, 'single_object': 1.0, 'single_object_se': None, 'counting': 0.0, 'counting_se': None}
"""

_CITATION = """\
@inproceedings{ghosh2023geneval,
  title = {{GenEval}: An Object-Focused Framework for Evaluating Text-to-Image Alignment},
  author = {Ghosh, Dhruba and Hajishirzi, Hannaneh and Schmidt, Ludwig},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  url = {https://huggingface.co/papers/2310.11513}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class GenEval(evaluate.Metric):
    def _info(self):
        text, number = datasets.Value("string"), datasets.Value("float64")
        objects = [{"label": text, "color": text, "box": datasets.Sequence(number), "score": number}]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": objects}),
                datasets.Features({"predictions": datasets.Image()}),
            ],
            codebase_urls=["https://github.com/djghosh13/geneval"],
            reference_urls=["https://huggingface.co/papers/2310.11513"],
        )

    def _compute(self, predictions, include, tags, exclude=None, detector=None, color_model=None):
        for name, values in (("include", include), ("tags", tags), ("exclude", exclude)):
            if values is not None and len(values) != len(predictions):
                raise ValueError(
                    f"`{name}` has {len(values)} entries, but there are {len(predictions)} images: pass one for each."
                )
        if predictions and isinstance(predictions[0], list):
            finds, images = Found(predictions), [None] * len(predictions)
        elif callable(detector):
            finds, images = detector, predictions
        else:
            names = {"model": detector, "clip": color_model}
            finds = TransformersDetector(**{name: value for name, value in names.items() if value is not None})
            images = predictions
        reward = SceneReward(finds, strict=True)
        right = defaultdict(list)
        for tag, score in zip(tags, reward(images=images, include=include, exclude=exclude, tag=tags), strict=True):
            right[tag].append(score)
        scores = {}
        for tag, values in right.items():
            scores |= summarize(tag, values)
        errors = [scores[f"{tag}_se"] for tag in right]
        overall = summarize("overall", [scores[tag] for tag in right])
        overall["overall_se"] = None if None in errors else sum(se**2 for se in errors) ** 0.5 / len(errors)
        return overall | scores


class Found:
    """A detector that has found the objects already."""

    counting_threshold = COUNTING_THRESHOLD

    def __init__(self, predictions):
        self.objects = [
            [Detection(item["label"], item["color"], tuple(item["box"]), item["score"]) for item in objects]
            for objects in predictions
        ]

    def __call__(self, images):
        return self.objects
