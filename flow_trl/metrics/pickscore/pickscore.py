"""How much people would prefer images for their prompts, as a module for `evaluate`."""

import evaluate

from flow_trl.metrics import images
from flow_trl.rewards import clip


_DESCRIPTION = """\
Says how much people would prefer images for their prompts, by a CLIP model that was trained on such choices (PickScore).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[PIL.Image.Image]`):
        Images of any size, or their paths.
    references (`list[str]`):
        The prompt of each image.
    groups (`list`, *optional*):
        Names the prompt of each image, where there are several images for a prompt. The standard errors then allow for
        their resemblance. By default the images count as independent.
    options (*optional*):
        Arguments of `flow_trl.rewards.clip.PickScore`: `model` and `processor` (Hub ids or folders),
        `device`, `batch_size`.

Returns:
    `dict`:

    - `pickscore` (`float`): mean over images, around 20 for most.
    - `pickscore_se` (`float`): its standard error, std / sqrt(n) unless there are `groups`. `None` for one image or group.
    - `scores` (`list[float]`): the score of each image.

Raises:
    ValueError: if there are no images, if the inputs differ in length, or if no model can be loaded.

Examples:

    >>> pickscore = flow_trl.metrics.load("pickscore")
    >>> results = pickscore.compute(predictions=[image], references=["a photo of a red square"])
    >>> results["pickscore"], results["scores"]
"""

_CITATION = """\
@inproceedings{kirstain2023pickapic,
  title = {{Pick-a-Pic}: An Open Dataset of User Preferences for Text-to-Image Generation},
  author = {Kirstain, Yuval and Polyak, Adam and Singer, Uriel and Matiana, Shahbuland and Penna, Joe and Levy, Omer},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  url = {https://huggingface.co/papers/2305.01569}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PickScore(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=images.PROMPTED,
            codebase_urls=["https://github.com/yuvalkirstain/PickScore"],
            reference_urls=["https://huggingface.co/papers/2305.01569"],
        )

    def _compute(self, predictions, references, groups=None, **options):
        return images.mean_reward("pickscore", clip.PickScore, predictions, references, groups, options)
