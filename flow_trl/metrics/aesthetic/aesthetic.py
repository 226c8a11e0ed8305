"""Aesthetic Score of images, as a module for `evaluate`."""

import datasets
import evaluate

from flow_trl.metrics import summarize
from flow_trl.rewards.clip import AestheticScore


_DESCRIPTION = """\
How beautiful people find images, whatever their prompts, by LAION's predictor on CLIP's image embedding.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[PIL.Image.Image]`):
        Images.
    model (`str`, *optional*):
        Hub id or folder of the CLIP; see [`~flow_trl.rewards.clip.AestheticScore`] for the default.
    processor (`str`, *optional*):
        Hub id or folder of its processor.
    head (`str`, *optional*):
        File or `"owner/repository/file"` of the predictor's weights, see [`~flow_trl.rewards.clip.AestheticScore`].
    device (`str`, *optional*):
        Where the model runs. Defaults to the GPU if there is one.
    batch_size (`int`, *optional*, defaults to `64`):
        Images per forward pass.

Returns:
    `dict[str, float]`: `aesthetic`, the mean over the images; most lie between 4 and 7, and `aesthetic_se`, std / sqrt(number of images), `None` for
    one.

Raises:
    ValueError: if there are no images, or no model can be loaded.

Examples:

    >>> metric = flow_trl.metrics.load("aesthetic")
    >>> metric.compute(predictions=[image])
"""

_CITATION = """\
@misc{schuhmann2022aesthetic,
  title = {Improved Aesthetic Predictor},
  author = {Schuhmann, Christoph},
  year = {2022},
  url = {https://github.com/christophschuhmann/improved-aesthetic-predictor}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AestheticMetric(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Image()}),
            codebase_urls=["https://github.com/christophschuhmann/improved-aesthetic-predictor"],
            reference_urls=["https://huggingface.co/papers/2305.13301"],
        )

    def _compute(self, predictions, **options):
        reward = AestheticScore(**options)
        return summarize("aesthetic", reward(prompts=[""] * len(predictions), images=predictions))
