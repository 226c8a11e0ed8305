"""Pass@k from sampled completions, as a module for `evaluate`."""

import datasets
import evaluate

from flow_trl.metrics import pass_at_k, summarize


_DESCRIPTION = """\
Estimates how often at least one of k sampled completions is correct, without bias, and its standard error over prompts.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[bool]]`):
        Of each prompt, which of its completions are correct.
    k (`list[int]`, *optional*, defaults to `[1]`):
        Values of k, each at least 1 and at most the number of completions of a prompt.

Returns:
    `dict[str, float]`: for each k `pass@{k}` in [0, 1], the mean over prompts of 1 - C(n - c, k) / C(n, k) with c correct
    ones of n, and `pass@{k}_se`, std / sqrt(number of prompts), `None` for one prompt.

Raises:
    ValueError: if there are no prompts, or a k does not fit.

Examples:

    >>> metric = flow_trl.metrics.load("pass_at_k")
    >>> metric.compute(predictions=[[1, 0, 0, 0], [1, 1, 1, 1]], k=[1, 2])
    {'pass@1': 0.625, 'pass@1_se': 0.375, 'pass@2': 0.75, 'pass@2_se': 0.25}
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
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("bool"))}),
            codebase_urls=["https://github.com/openai/human-eval"],
            reference_urls=["https://huggingface.co/papers/2107.03374"],
        )

    def _compute(self, predictions, k=(1,)):
        results = {}
        for size in k:
            for index, row in enumerate(predictions):
                if not 1 <= size <= len(row):
                    raise ValueError(
                        f"`k` holds {size}, but `predictions[{index}]` has {len(row)} completions: use values from 1 to "
                        f"{len(row)}."
                    )
            results |= summarize(f"pass@{size}", [pass_at_k(len(row), sum(row), size) for row in predictions])
        return results
