"""How well texts in images can be read, as a module for `evaluate`."""

import datasets
import evaluate

from flow_trl.metrics import summarize
from flow_trl.rewards.ocr import OCRReward, ocr_score


_DESCRIPTION = """\
Says how well the texts that images should show can be read in them: by the edit distance of the reading, and by
Flow-GRPO's rule, which forgives whatever stands beside the text.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]` or `list[PIL.Image.Image]`):
        Readings, or images, which are read by PP-OCR ([`~flow_trl.rewards.ocr.OCRReward`]).
    references (`list[str]`):
        The texts that should be there.

Returns:
    `dict[str, float]`: means in [0, 1], with d the edit distance between reading and text, and n the length of the text, both
    without spaces and in lower case:

    - `edit_distance`: 1 - min(d / n, 1).
    - `flow_grpo`: the same, but 1 where the reading contains the text.
    - `exact`: 1 where the reading is the text, else 0.
    - `{name}_se` for each: std / sqrt(number of samples), `None` for one.

Raises:
    ValueError: if there are no samples, or a text is blank.

Examples:

    >>> metric = flow_trl.metrics.load("ocr_accuracy")
    >>> results = metric.compute(predictions=["OPEN 24h", "cat"], references=["open", "car"])
    >>> {name: round(results[name], 3) for name in ("edit_distance", "flow_grpo", "exact")}
    {'edit_distance': 0.458, 'flow_grpo': 0.833, 'exact': 0.0}
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
class OCRAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": predictions, "references": datasets.Value("string")})
                for predictions in (datasets.Value("string"), datasets.Image())
            ],
            codebase_urls=["https://github.com/yifan123/flow_grpo", "https://github.com/RapidAI/RapidOCR"],
            reference_urls=["https://huggingface.co/papers/2505.05470"],
        )

    def _compute(self, predictions, references):
        if predictions and not isinstance(predictions[0], str):
            predictions = OCRReward().read(predictions)
        pairs = list(zip(predictions, references, strict=True))
        edit_distance = [ocr_score(reading, text) for reading, text in pairs]
        results = summarize("edit_distance", edit_distance)
        results |= summarize("flow_grpo", [ocr_score(reading, text, contained=True) for reading, text in pairs])
        return results | summarize("exact", [float(score == 1) for score in edit_distance])
