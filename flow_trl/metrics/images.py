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
