"""Share of images that show the objects, counts, colours and positions that were asked for, as a module for `evaluate`."""

import math

import datasets
import evaluate
import numpy as np
from PIL import Image

from flow_trl.metrics import check_samples, images, summarize
from flow_trl.prompts import GENEVAL_FEATURES
from flow_trl.rewards import get_reward_func, import_dotted
from flow_trl.rewards.scene import SceneReward


_DESCRIPTION = """\
Says what share of images show the objects, counts, colours and positions that GenEval's prompts ask for: for each kind of
prompt, and overall, the mean over kinds.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[bool]` or `list[PIL.Image.Image]`):
        Whether each image is correct, as GenEval's `evaluate_images.py` found it, or the images.
    references (`list[str]` or `list[dict]`):
        The tag of each image's prompt (`"counting"`, ...); for images GenEval's metadata: `tag`, `include` and `exclude`. Other
        keys are not used.
    detector (`str` or `Callable`, *optional*):
        For images: what finds objects, a function for `flow_trl.rewards.scene.SceneReward` or its dotted path. By default
        images are judged by the built-in reward `"geneval_strict"`, which loads its models from the Hub.
    groups (`list`, *optional*):
        Names the prompt of each image, where there are several images for a prompt. The standard errors then allow for
        their resemblance. By default the images count as independent.

Returns:
    `dict`:

    - `{tag}` (`float`), for each tag: share of its images that are correct, in [0, 1].
    - `overall` (`float`): mean over the tags.
    - `{tag}_se`, `overall_se` (`float`): their standard errors. `None` for one image or group of a tag.
    - `correct` (`list[bool]`): whether each image is correct.

Raises:
    ValueError: if there are no predictions, if one is neither an image nor 0 or 1, if the inputs differ in length, if metadata has no `tag` or `include`, if a tag is
        called as another result, or if no detector can be loaded.

Examples:

    >>> geneval = flow_trl.metrics.load("geneval")
    >>> results = geneval.compute(
    ...     predictions=[True, False, True, True], references=["counting", "counting", "colors", "colors"]
    ... )
    >>> results["counting"], results["colors"], results["overall"]
    (0.5, 1.0, 0.75)
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

METADATA = {name: GENEVAL_FEATURES[name] for name in ("tag", "include", "exclude")}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class GenEval(images.EitherFormat):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": datasets.Value("bool"), "references": datasets.Value("string")}),
                datasets.Features({"predictions": datasets.Image(), "references": METADATA}),
            ],
            codebase_urls=["https://github.com/djghosh13/geneval"],
            reference_urls=["https://huggingface.co/papers/2310.11513"],
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Adds images, whose metadata may have other keys."""
        if references and isinstance(references[0], dict):
            for index, row in enumerate(references):
                if not row.get("tag") or not row.get("include"):
                    raise ValueError(
                        f"`references[{index}]` is {row}: an image needs GenEval's metadata, `tag` and `include`."
                    )
            references = [_whole(row) for row in references]
        else:  # `datasets` would take any number or text but 0 as true
            for index, value in enumerate(() if predictions is None else predictions):
                if not (isinstance(value, bool | int | float | np.number | np.bool_) and value in (0, 1)):
                    raise ValueError(
                        f"`predictions[{index}]` is {value!r}: with tags as `references` it says whether the image is correct, "
                        "True or False. Pass images with GenEval's metadata."
                    )
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions, references, detector=None, groups=None):
        check_samples(len(predictions), groups)
        has_images = isinstance(predictions[0], Image.Image)
        tags = [row["tag"] for row in references] if has_images else references
        kinds = list(dict.fromkeys(tags))
        if {"overall", "correct"} & set(kinds):
            raise ValueError(
                f"`references` has the tags {kinds}: one must not be 'overall' or 'correct', which are results."
            )
        if has_images:
            columns = {name: [row[name] for row in references] for name in METADATA}
            scores = _judge(detector)(prompts=[""] * len(predictions), images=predictions, **columns)
            predictions = [score == 1 for score in scores]
        results, groups = {}, range(len(tags)) if groups is None else groups
        for tag in kinds:
            rows = [index for index, other in enumerate(tags) if other == tag]
            results |= summarize(tag, [float(predictions[row]) for row in rows], [groups[row] for row in rows])
        errors = [results[f"{tag}_se"] for tag in kinds]
        results["overall"] = math.fsum(results[tag] for tag in kinds) / len(kinds)
        results["overall_se"] = None if None in errors else math.hypot(*errors) / len(kinds)
        return results | {"correct": list(predictions)}


def _whole(row):
    """The metadata that counts, with every key, and positions of strings alone."""
    include = []
    for entry in row["include"]:
        position = entry.get("position")
        include.append({name: entry.get(name) for name in ("class", "count", "color", "position")})
        include[-1]["position"] = None if position is None else list(map(str, position))
    exclude = [{name: entry[name] for name in ("class", "count")} for entry in row.get("exclude") or []]
    return {"tag": row["tag"], "include": include, "exclude": exclude}


def _judge(detector):
    if detector is None:
        return get_reward_func("geneval_strict")
    return SceneReward(import_dotted(detector, "detector") if isinstance(detector, str) else detector, strict=True)
