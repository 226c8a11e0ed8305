"""PickScore of images, as a module for `evaluate`."""

import datasets
import evaluate

from flow_trl.metrics import summarize
from flow_trl.rewards.clip import PickScore


_DESCRIPTION = """\
Which images people would prefer for their prompts, by a CLIP that was trained on such choices.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[PIL.Image.Image]`):
        Images.
    references (`list[str]`):
        The prompt of each image.
    model (`str`, *optional*):
        Hub id or folder of the CLIP; see [`~flow_trl.rewards.clip.PickScore`] for the default.
    processor (`str`, *optional*):
        Hub id or folder of its processor.
    device (`str`, *optional*):
        Where the model runs. Defaults to the GPU if there is one.
    batch_size (`int`, *optional*, defaults to `64`):
        Images per forward pass.

Returns:
    `dict[str, float]`: `pickscore`, the mean over the images; most lie between 18 and 24, and `pickscore_se`, std / sqrt(number of images), `None` for
    one.

Raises:
    ValueError: if there are no images, or no model can be loaded.

Examples:

    >>> metric = flow_trl.metrics.load("pickscore")
    >>> metric.compute(predictions=[image], references=["a red square"])
"""

_CITATION = """\
@inproceedings{kirstain2023pickapic,
  title = {{Pick-a-Pic}: An Open Dataset of User Preferences for Text-to-Image Generation},
  author = {Kirstain, Yuval and others},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  url = {https://huggingface.co/papers/2305.01569}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PickScoreMetric(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Value("string")}),
            codebase_urls=["https://github.com/yuvalkirstain/PickScore"],
            reference_urls=["https://huggingface.co/papers/2305.01569"],
        )

    def _compute(self, predictions, references, **options):
        reward = PickScore(**options)
        return summarize("pickscore", reward(prompts=references, images=predictions))
