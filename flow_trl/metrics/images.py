"""What the metrics of images share."""

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import datasets
import evaluate
from PIL import Image, ImageDraw

from . import check_samples, summarize


PROMPTED = datasets.Features({"predictions": datasets.Image(), "references": datasets.Value("string")})


class EitherFormat(evaluate.Metric):
    """A metric with several formats, of which `evaluate` finds the right one by the first sample: there must be one."""

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Adds samples."""  # to which `evaluate` adds what the inputs are
        check_samples(0 if predictions is None else len(predictions))
        super().add_batch(predictions=predictions, references=references, **kwargs)


_INPUTS = """
Args:
    predictions (`list[PIL.Image.Image]`):
        Images of any size, or their paths.
{references}    groups (`list`, *optional*):
        Names the prompt of each image, where there are several images for a prompt. The standard errors then allow for
        their resemblance. By default the images count as independent.
    options (*optional*):
        Arguments of `flow_trl.rewards.clip.{reward}`: `model` and `processor` (Hub ids or folders),
        {options}`device`, `batch_size`.

Returns:
    `dict`:

    - `{name}` (`float`): mean over images, {scale}.
    - `{name}_se` (`float`): its standard error, std / sqrt(n) unless there are `groups`. `None` for one image or group.
    - `scores` (`list[float]`): the score of each image.

Raises:
    ValueError: if there are no images, if the inputs differ in length, or if no model can be loaded.

Examples:

    >>> {name} = flow_trl.metrics.load("{name}")
    >>> results = {name}.compute({example})
    >>> results["{name}"], results["scores"]
"""
_REFERENCES = """\
    references (`list[str]`):
        The prompt of each image.
"""


def inputs_of_reward(name: str, reward: str, scale: str, options: str = "", has_prompts: bool = True) -> str:
    """What a metric takes and gives that is the mean of a CLIP reward, which may have further `options`."""
    references = _REFERENCES if has_prompts else ""
    example = "predictions=[image]" + (', references=["a photo of a red square"]' if has_prompts else "")
    return _INPUTS.format(
        name=name, reward=reward, scale=scale, options=options, references=references, example=example
    )


@lru_cache(maxsize=1)  # large models: the last one stays
def _load(reward: Callable, options: tuple) -> Callable:
    return reward(**dict(options))


def mean_reward(
    name: str,
    reward: Callable[..., Callable],
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    groups: Sequence[Hashable] | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The mean of an image reward, made of its class and `options`, with its standard error and all `scores`."""
    check_samples(len(images), groups)
    scores = _load(reward, tuple(sorted(options.items())))(prompts=prompts, images=images)
    return summarize(name, scores, groups) | {"scores": scores}


def draw_square(color: str) -> Image.Image:
    """The picture of the metrics' test cases: a square of a colour on a light background, RGB, 32 x 32."""
    image = Image.new("RGB", (32, 32), (245, 245, 245))
    ImageDraw.Draw(image).rectangle((10, 10, 21, 21), fill=color)
    return image
