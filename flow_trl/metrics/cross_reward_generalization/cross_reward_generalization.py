"""How rewards that are not trained move while the trained one rises, as a module for `evaluate`."""

import math

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """\
Compares methods by how little the rewards that were not trained (out of domain) fall while the trained one (in domain)
rises: their value at the same in-domain score, its change since the start, and the rank correlation of the two.
"""

_KWARGS_DESCRIPTION = """
Args:
    methods (`list[str]`):
        The method of each checkpoint. The checkpoints of a run are in order of training; runs may be interleaved.
    in_domain (`list[float]`):
        The trained reward of each checkpoint.
    out_of_domain (`list[list[float]]`):
        The other rewards of each checkpoint, in the order of `reward_names`.
    reward_names (`list[str]`):
        Names of the out-of-domain rewards.
    runs (`list`, *optional*):
        Names the run (the seed) of each checkpoint, where a method was trained several times. By default all
        checkpoints of a method are one run.
    matched_score (`float`, *optional*):
        The in-domain score at which methods are compared. Defaults to the largest one that every run reached: the
        minimum over runs of the run's maximum.

Returns:
    `dict`: `matched_score` (`float`), and for each reward name and method, `results[reward][method]`, a
    `dict[str, float]` of means over the method's runs:

    - `value_at_matched`: the out-of-domain reward where the run first reaches `matched_score`, by linear interpolation
      between the two checkpoints around it. `None` if a run never reaches that score or starts above it.
    - `change_from_start`: that value minus the one of the run's first checkpoint; negative where the reward fell.
    - `rank_correlation`: Spearman's, between in-domain and out-of-domain reward over all checkpoints of a run, in
      [-1, 1]. `None` if either is constant in a run.
    - `{name}_se` for each of these: its standard error over runs, std / sqrt(number of runs). `None` for one run.

Raises:
    ValueError: if there are no checkpoints, if the inputs differ in length, if a value is not finite, if a checkpoint
        has not one value for each of `reward_names` or these are not distinct, or if a run has a single checkpoint.

Examples:

    >>> cross_reward = flow_trl.metrics.load("cross_reward_generalization")
    >>> results = cross_reward.compute(
    ...     methods=["DDPO", "DDPO", "DDPO", "TDPO-R", "TDPO-R", "TDPO-R"],
    ...     in_domain=[5.0, 6.0, 8.0, 5.0, 6.0, 7.0],
    ...     out_of_domain=[[0.4], [0.3], [0.1], [0.4], [0.5], [0.3]],
    ...     reward_names=["pickscore"],
    ... )
    >>> results["matched_score"]
    7.0
    >>> {method: round(values["change_from_start"], 3) for method, values in results["pickscore"].items()}
    {'DDPO': -0.2, 'TDPO-R': -0.1}
"""

_CITATION = """\
@inproceedings{zhang2024confronting,
  title = {Confronting Reward Overoptimization for Diffusion Models: A Perspective of Inductive and Primacy Biases},
  author = {Zhang, Ziyi and Zhang, Sen and Zhan, Yibing and Luo, Yong and Wen, Yonggang and Tao, Dacheng},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  url = {https://huggingface.co/papers/2402.08552}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CrossRewardGeneralization(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "methods": datasets.Value("string"),
                    "in_domain": datasets.Value("float64"),
                    "out_of_domain": datasets.Sequence(datasets.Value("float64")),
                }
            ),
            codebase_urls=["https://github.com/ZiyiZhang27/tdpo"],
            reference_urls=["https://huggingface.co/papers/2402.08552"],
        )

    def _compute(self, methods, in_domain, out_of_domain, reward_names, runs=None, matched_score=None):
        x, y = _checked(in_domain, out_of_domain, reward_names)
        if runs is not None and len(runs) != len(x):
            raise ValueError(f"`runs` has {len(runs)} entries, but there are {len(x)} checkpoints: pass one for each.")
        curves = {}
        for row, method in enumerate(methods):
            curves.setdefault((method, None if runs is None else runs[row]), []).append(row)
        for (method, run), rows in curves.items():
            if len(rows) == 1:
                name = f"{method!r}" if runs is None else f"run {run!r} of {method!r}"
                raise ValueError(
                    f"`methods` has one checkpoint of {name}: pass two or more, with the first one's score."
                )
        if matched_score is None:
            matched_score = min(x[rows].max() for rows in curves.values())
        elif not math.isfinite(matched_score):
            raise ValueError(f"`matched_score={matched_score}`: it must be finite, or None.")

        results = {"matched_score": float(matched_score)}
        for name, values in zip(reward_names, y.T, strict=True):
            results[name] = {
                method: _over_runs(
                    [_scores(x[rows], values[rows], matched_score) for key, rows in curves.items() if key[0] == method]
                )
                for method in dict.fromkeys(methods)
            }
        return results


def _checked(in_domain, out_of_domain, reward_names):
    """Both as arrays of float64, (checkpoints) and (checkpoints, rewards)."""
    if len(in_domain) == 0:
        raise ValueError("`in_domain` is empty: there is nothing to evaluate.")
    # The results have the matched score and the rewards side by side.
    if len({"matched_score", *reward_names}) != len(reward_names) + 1 or len(reward_names) == 0:
        raise ValueError(
            f"`reward_names={reward_names}`: pass distinct names, one or more, none of them 'matched_score'."
        )
    for index, values in enumerate(out_of_domain):
        if len(values) != len(reward_names):
            raise ValueError(
                f"`out_of_domain[{index}]` has {len(values)} entries, but `reward_names` has {len(reward_names)}: "
                "pass one value for each name."
            )
    x, y = np.asarray(in_domain, dtype=float), np.asarray(out_of_domain, dtype=float)
    for name, values in (("in_domain", x), ("out_of_domain", y)):
        for index, value in enumerate(values):
            if not np.isfinite(value).all():
                raise ValueError(
                    f"`{name}[{index}]` is {value}: leave out a checkpoint whose rewards are not all known."
                )
    return x, y


def _scores(x, y, matched_score):
    """The results for one run and one reward."""
    value = math.nan
    reached = np.flatnonzero(x >= matched_score)
    if x[0] <= matched_score and len(reached):
        around = slice(max(reached[0] - 1, 0), reached[0] + 1)
        value = np.interp(matched_score, x[around], y[around])
    varied = np.ptp(x) > 0 and np.ptp(y) > 0
    return {
        "value_at_matched": value,
        "change_from_start": value - y[0],
        "rank_correlation": np.corrcoef(_ranks(x), _ranks(y))[0, 1] if varied else math.nan,
    }


def _ranks(values):
    """Ranks from 1, equal values having the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _over_runs(scores):
    """Means and standard errors over runs."""
    results = {}
    for name in scores[0]:
        values = [of_run[name] for of_run in scores]
        results[name] = np.mean(values)
        results[f"{name}_se"] = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {name: None if math.isnan(value) else float(value) for name, value in results.items()}
