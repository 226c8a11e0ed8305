"""Accuracy of one answer chosen among several with their confidences, as a module for `evaluate`."""

import math
from collections import defaultdict

import datasets
import evaluate

from flow_trl import metrics


_DESCRIPTION = """\
Says how much several sampled answers with confidences are worth: pass@k, and the accuracy of the answer that is chosen
by majority, by the highest confidence, and by a majority weighted with the confidences.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[str]]`):
        The sampled answers to each prompt. Equal strings are one candidate. `None` or an empty string is a missing
        answer: it is wrong and no candidate.
    references (`list[str]`):
        The right answer to each prompt.
    confidences (`list[list[float]]`):
        The confidence in each answer, in [0, 1]. `None` is a missing confidence and counts as 0.
    correct (`list[list[bool]]`, *optional*):
        Whether each answer is correct. By default those are that equal the reference.
    k (`list[int]`, *optional*, defaults to `[1]`):
        Values of k for pass@k, each at least 1 and at most the number of answers to a prompt.

Returns:
    `dict[str, float]`, means over prompts in [0, 1]:

    - `pass@{k}` for each k: probability that one or more of k answers, drawn from the n without replacement, is correct:
      1 - C(n - c, k) / C(n, k), with c the number of correct ones.
    - `majority`: accuracy of the most frequent answer.
    - `highest_confidence`: accuracy of the answer with the highest confidence.
    - `weighted_majority`: accuracy of the answer whose confidences have the highest sum.
    - `{name}_se` for each of these: its standard error over prompts, std / sqrt(number of prompts). `None` for one prompt.

    Where several answers are tied, the mean of their accuracies counts, so the results do not depend on an order.
    `highest_confidence` ties samples, the others distinct answers. A prompt whose answers are all missing counts as 0.

Raises:
    ValueError: if there are no prompts, if a prompt has no answers or not as many confidences (or `correct`) as
        answers, if a confidence is not in [0, 1], or if a k is below 1 or more than the answers to a prompt.

Examples:

    >>> voting = flow_trl.metrics.load("confidence_voting")
    >>> voting.compute(
    ...     predictions=[["4", "5", "5", None], ["7", "7", "8", "9"]],
    ...     references=["4", "7"],
    ...     confidences=[[0.9, 0.3, 0.4, None], [0.2, 0.5, 0.8, 0.1]],
    ...     k=[1, 2],
    ... )
    {'pass@1': 0.375, 'pass@1_se': 0.125, 'pass@2': 0.6666666666666667, 'pass@2_se': 0.16666666666666669,
    'majority': 0.5, 'majority_se': 0.5, 'highest_confidence': 0.5, 'highest_confidence_se': 0.5,
    'weighted_majority': 0.5, 'weighted_majority_se': 0.5}
"""

_CITATION = """\
@article{chen2021evaluating,
  title = {Evaluating Large Language Models Trained on Code},
  author = {Chen, Mark and others},
  journal = {arXiv preprint arXiv:2107.03374},
  year = {2021},
  url = {https://huggingface.co/papers/2107.03374}
}
@inproceedings{wang2023selfconsistency,
  title = {Self-Consistency Improves Chain of Thought Reasoning in Language Models},
  author = {Wang, Xuezhi and others},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
  url = {https://huggingface.co/papers/2203.11171}
}
@article{pavlenko2026blockwise,
  title = {Blockwise Advantage Estimation for Multi-Objective {RL} with Verifiable Rewards},
  author = {Pavlenko, Kirill and Golubev, Alexander and Karasik, Simon and Yangel, Boris},
  journal = {arXiv preprint arXiv:2602.10231},
  year = {2026},
  url = {https://huggingface.co/papers/2602.10231}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ConfidenceVoting(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    # With "string", `evaluate` refuses a first prompt whose answers are all missing.
                    "predictions": datasets.Sequence(datasets.Value("large_string")),
                    "references": datasets.Value("string"),
                    "confidences": datasets.Sequence(datasets.Value("float64")),
                }
            ),
            codebase_urls=["https://github.com/openai/human-eval"],
            reference_urls=["https://huggingface.co/papers/2107.03374", "https://huggingface.co/papers/2203.11171"],
        )

    def _compute(self, predictions, references, confidences, correct=None, k=(1,)):
        metrics.check_samples(len(predictions))
        if correct is None:
            correct = [[answer == gold for answer in row] for row, gold in zip(predictions, references, strict=True)]
        if len(correct) != len(predictions):
            raise ValueError(f"`correct` has {len(correct)} prompts, but `predictions` has {len(predictions)}.")
        scores = defaultdict(list)
        for index, row in enumerate(zip(predictions, confidences, correct, strict=True)):
            for name, score in _scores(*row, k, index).items():
                scores[name].append(score)
        results = {}
        for name, values in scores.items():
            results |= metrics.summarize(name, values)
        return results


def _scores(answers, confidences, correct, k, index):
    """The results for one prompt."""
    n = len(answers)
    if n == 0:
        raise ValueError(f"`predictions[{index}]` is empty: pass one or more answers for each prompt.")
    for name, values in (("confidences", confidences), ("correct", correct)):
        if len(values) != n:
            raise ValueError(f"`{name}[{index}]` has {len(values)} entries, but `predictions[{index}]` has {n}.")
    weights = [0.0 if confidence is None else confidence for confidence in confidences]
    for weight in weights:
        if not 0 <= weight <= 1:
            raise ValueError(f"`confidences[{index}]` holds {weight}: a confidence is in [0, 1], or None.")
    right = [float(bool(answer) and bool(is_right)) for answer, is_right in zip(answers, correct, strict=True)]
    c = int(sum(right))
    scores = {f"pass@{size}": metrics.pass_at_k(n, c, size) for size in k}

    samples = [i for i, answer in enumerate(answers) if answer]
    votes = defaultdict(list)
    for i in samples:
        votes[answers[i]].append(i)
    # Samples of equal answers may differ in `correct`, which may look at more than the answer.
    accuracies = [math.fsum(right[i] for i in voters) / len(voters) for voters in votes.values()]
    confidence = [math.fsum(weights[i] for i in voters) for voters in votes.values()]
    scores["majority"] = _choose([len(voters) for voters in votes.values()], accuracies)
    scores["highest_confidence"] = _choose([weights[i] for i in samples], [right[i] for i in samples])
    scores["weighted_majority"] = _choose(confidence, accuracies)
    return scores


def _choose(values, accuracies):
    """Mean accuracy of the candidates with the highest value, 0 if there are no candidates."""
    # 0.1 + 0.2 and 0.3 are tied.
    best = [accuracy for value, accuracy in zip(values, accuracies, strict=True) if value >= max(values) - 1e-9]
    return math.fsum(best) / len(best) if best else 0.0
