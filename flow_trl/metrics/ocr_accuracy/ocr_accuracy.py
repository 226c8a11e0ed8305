"""Whether images show the text that was asked for, as a module for `evaluate`."""

from functools import cache
from pathlib import Path

import datasets
import evaluate
from PIL import Image

from flow_trl.metrics import check_samples, images, summarize
from flow_trl.rewards.ocr import OCRReward, ocr_score


_DESCRIPTION = """\
Says how well texts that were read in images agree with those that were asked for, by two rules: that of Flow-GRPO, for which
it is enough that the target is contained, and a stricter one, for which text beside the target costs.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]` or `list[PIL.Image.Image]`):
        Texts that were read in images, or the images, which PP-OCR reads here (`pip install "flow-trl[ocr]"`).
    references (`list[str]`):
        The text that was asked for, of each.
    groups (`list`, *optional*):
        Names the prompt of each image, where there are several images for a prompt. The standard errors then allow for
        their resemblance. By default the images count as independent.

Returns:
    `dict`, with d the edit distance (Levenshtein) of the reading and the target and n the target's length, both without
    whitespace and in lower case:

    - `flow_grpo` (`float`): mean of 1 where the reading contains the target, else 1 - min(d, n) / n; in [0, 1].
    - `flow_trl` (`float`): mean of 1 - min(d, n) / n; in [0, 1]. The reward `"ocr"`.
    - `exact` (`float`): share of readings that equal their targets.
    - `flow_grpo_se`, `flow_trl_se`, `exact_se` (`float`): their standard errors, std / sqrt(n) unless there are `groups`.
      `None` for one image or group.
    - `readings` (`list[str]`): what was read.

Raises:
    ValueError: if there are no predictions, if one is missing or names an image's file, if the inputs differ in length, or if a target has no letters.
    MissingExtraError: if the packages of the extra `ocr` are not installed.

Examples:

    >>> ocr_accuracy = flow_trl.metrics.load("ocr_accuracy")
    >>> results = ocr_accuracy.compute(predictions=["New Hope Cafe", "HOPE"], references=["Hope", "Rope"])
    >>> results["flow_grpo"], results["flow_trl"], results["exact"]
    (0.875, 0.375, 0.0)
"""

_CITATION = """\
@article{liu2025flowgrpo,
  title = {{Flow-GRPO}: Training Flow Matching Models via Online {RL}},
  author = {Liu, Jie and others},
  journal = {arXiv preprint arXiv:2505.05470},
  year = {2025},
  url = {https://huggingface.co/papers/2505.05470}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class OCRAccuracy(images.EitherFormat):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": kind, "references": datasets.Value("string")})
                for kind in (datasets.Value("string"), datasets.Image())
            ],
            codebase_urls=["https://github.com/yifan123/flow_grpo"],
            reference_urls=["https://huggingface.co/papers/2505.05470"],
        )

    def _compute(self, predictions, references, groups=None):
        check_samples(len(predictions), groups)
        for index, target in enumerate(references):
            if not target.strip():
                raise ValueError(f"`references[{index}]` is {target!r}: leave out images that should show no text.")
        if isinstance(predictions[0], Image.Image):
            predictions = _reader().read(predictions)
        for index, reading in enumerate(predictions):
            if reading is None or _is_image_file(Path(reading)):
                raise ValueError(
                    f"`predictions[{index}]` is {reading!r}, which is no reading: pass what was read, or open images."
                )
        pairs = list(zip(predictions, references, strict=True))
        near = [ocr_score(reading, target) for reading, target in pairs]
        scores = {
            "flow_grpo": [ocr_score(reading, target, contained=True) for reading, target in pairs],
            "flow_trl": near,
            "exact": [float(score == 1) for score in near],
        }
        results = {}
        for name, values in scores.items():
            results |= summarize(name, values, groups)
        return results | {"readings": list(predictions)}


def _is_image_file(path):
    return path.suffix.lower() in Image.registered_extensions() and path.is_file()


@cache
def _reader():
    return OCRReward()
