"""Probability that one or more of k samples are correct, as a module for `evaluate`."""

import datasets
import evaluate

from flow_trl import metrics


_DESCRIPTION = """\
Says how likely one or more of k sampled answers are correct (pass@k), by the unbiased estimate from n >= k samples of each
prompt, with standard errors over prompts.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[bool]]` or `list[list[int]]`):
        Whether each of the samples of a prompt is correct; prompts may differ in their number of samples.
    k (`list[int]`, *optional*, defaults to `[1]`):
        Values of k, each at least 1 and at most the number of samples of a prompt.

Returns:
    `dict[str, float]`:

    - `pass@{k}` for each k: mean over prompts of 1 - C(n - c, k) / C(n, k), in [0, 1], with n samples of which c are correct.
    - `pass@{k}_se`: its standard error, std / sqrt(number of prompts). `None` for one prompt.

Raises:
    ValueError: if there are no prompts, if a prompt has no samples, if a sample is not 0 or 1, or if a k is below 1 or more
        than the samples of a prompt.

Examples:

    >>> pass_at_k = flow_trl.metrics.load("pass_at_k")
    >>> pass_at_k.compute(predictions=[[1, 0, 0, 0], [1, 1, 0, 0]], k=[1, 2])
    {'pass@1': 0.375, 'pass@1_se': 0.125, 'pass@2': 0.6666666666666667, 'pass@2_se': 0.16666666666666669}
"""

_CITATION = """\
@article{chen2021evaluating,
  title = {Evaluating Large Language Models Trained on Code},
  author = {Chen, Mark and others},
  journal = {arXiv preprint arXiv:2107.03374},
  year = {2021},
  url = {https://huggingface.co/papers/2107.03374}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PassAtK(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
            codebase_urls=["https://github.com/openai/human-eval"],
            reference_urls=["https://huggingface.co/papers/2107.03374"],
        )

    def _compute(self, predictions, k=(1,)):
        metrics.check_samples(len(predictions))
        for index, row in enumerate(predictions):
            if not row or any(value not in (0, 1) for value in row):
                raise ValueError(
                    f"`predictions[{index}]` is {row}: pass 0 (wrong) or 1 (correct) for each sample, one or more."
                )
        results = {}
        for size in k:
            scores = [metrics.pass_at_k(len(row), int(sum(row)), size) for row in predictions]
            results |= metrics.summarize(f"pass@{size}", scores)
        return results
