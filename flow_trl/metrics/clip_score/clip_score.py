"""CLIPScore of images, as a module for `evaluate`."""

import datasets
import evaluate

from flow_trl.metrics import summarize
from flow_trl.rewards.clip import ClipScore


_DESCRIPTION = """\
How well images fit their prompts, by the cosine of CLIP's embeddings.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[PIL.Image.Image]`):
        Images.
    references (`list[str]`):
        The prompt of each image.
    model (`str`, *optional*):
        Hub id or folder of the CLIP; see [`~flow_trl.rewards.clip.ClipScore`] for the default.
    processor (`str`, *optional*):
        Hub id or folder of its processor.
    device (`str`, *optional*):
        Where the model runs. Defaults to the GPU if there is one.
    batch_size (`int`, *optional*, defaults to `64`):
        Images per forward pass.

Returns:
    `dict[str, float]`: `clip_score`, the mean over the images, in [0, 100], and `clip_score_se`, std / sqrt(number of images), `None` for
    one.

Raises:
    ValueError: if there are no images, or no model can be loaded.

Examples:

    >>> metric = flow_trl.metrics.load("clip_score")
    >>> metric.compute(predictions=[image], references=["a red square"])
"""

_CITATION = """\
@inproceedings{hessel2021clipscore,
  title = {{CLIPScore}: A Reference-free Evaluation Metric for Image Captioning},
  author = {Hessel, Jack and Holtzman, Ari and Forbes, Maxwell and Le Bras, Ronan and Choi, Yejin},
  booktitle = {Conference on Empirical Methods in Natural Language Processing},
  year = {2021},
  url = {https://huggingface.co/papers/2104.08718}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ClipScoreMetric(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Value("string")}),
            codebase_urls=["https://github.com/jmhessel/clipscore"],
            reference_urls=["https://huggingface.co/papers/2104.08718"],
        )

    def _compute(self, predictions, references, **options):
        reward = ClipScore(**options)
        return summarize("clip_score", reward(prompts=references, images=predictions))
