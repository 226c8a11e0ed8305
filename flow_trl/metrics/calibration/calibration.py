"""Calibration of stated confidences, as a module for `evaluate`."""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """\
Says how well stated confidences agree with being right: accuracy, AUROC, Brier score and expected calibration error
(ECE), each with its standard error, and the bins of a reliability diagram.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[float]`):
        Confidences q, in [0, 1].
    references (`list[int]` or `list[bool]`):
        Whether each answer is correct, c: 0 or 1.
    groups (`list`, *optional*):
        Names the prompt of each sample, where there are several samples for a prompt. The standard errors then come
        from resampling whole prompts: samples of one prompt resemble each other, and resampling them one by one gives
        standard errors that are too small. By default the samples are resampled.
    num_resamples (`int`, *optional*, defaults to `1000`):
        Number of bootstrap resamples, at least 2.
    seed (`int`, *optional*, defaults to `0`):
        Seed of the resampling.

Returns:
    `dict`:

    - `accuracy` (`float`): mean of c.
    - `auroc` (`float`): probability that a correct answer has a higher confidence than a wrong one, ties counted half,
      in [0, 1]. `None` if all answers are correct or all are wrong.
    - `brier` (`float`): mean of (q - c)^2, in [0, 1]; lower is better.
    - `ece` (`float`): mean over samples of |accuracy - mean confidence| of the sample's bin, in [0, 1]; lower is
      better. The bins are [0, 0.1), [0.1, 0.2), ..., [0.9, 1), and 1 has a bin of its own.
    - `accuracy_se`, `auroc_se`, `brier_se`, `ece_se` (`float`): their standard errors, by bootstrap; that of the accuracy
      is std / sqrt(n) unless there are `groups`. `None` if there is nothing to resample: one sample or one group.
    - `bins` (`dict[str, list]`): for each of the eleven bins its `lower` end, `count`, mean `confidence` and `accuracy`;
      the last two are `None` where the bin is empty.

Raises:
    ValueError: if there are no samples, if the inputs differ in length, if a confidence is not in [0, 1] or a reference
        not 0 or 1, or if `num_resamples` is below 2.

Examples:

    >>> calibration = flow_trl.metrics.load("calibration")
    >>> results = calibration.compute(predictions=[0.9, 0.8, 0.8, 0.3, 1.0], references=[1, 1, 0, 0, 1])
    >>> {name: round(results[name], 3) for name in ("accuracy", "auroc", "brier", "ece")}
    {'accuracy': 0.6, 'auroc': 0.917, 'brier': 0.156, 'ece': 0.2}
    >>> results["bins"]["count"]
    [0, 0, 0, 1, 0, 0, 0, 0, 2, 1, 1]
"""

_CITATION = """\
@article{pavlenko2026blockwise,
  title = {Blockwise Advantage Estimation for Multi-Objective {RL} with Verifiable Rewards},
  author = {Pavlenko, Kirill and Golubev, Alexander and Karasik, Simon and Yangel, Boris},
  journal = {arXiv preprint arXiv:2602.10231},
  year = {2026},
  url = {https://huggingface.co/papers/2602.10231}
}
@article{brier1950verification,
  title = {Verification of forecasts expressed in terms of probability},
  author = {Brier, Glenn W.},
  journal = {Monthly Weather Review},
  volume = {78},
  number = {1},
  pages = {1--3},
  year = {1950}
}
@inproceedings{naeini2015obtaining,
  title = {Obtaining Well Calibrated Probabilities Using {Bayesian} Binning},
  author = {Naeini, Mahdi Pakdaman and Cooper, Gregory F. and Hauskrecht, Milos},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year = {2015}
}
@inproceedings{guo2017calibration,
  title = {On Calibration of Modern Neural Networks},
  author = {Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle = {International Conference on Machine Learning},
  year = {2017},
  url = {https://huggingface.co/papers/1706.04599}
}
"""

LOWER_ENDS = np.arange(11) / 10


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Calibration(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
            codebase_urls=["https://github.com/gpleiss/temperature_scaling"],
            reference_urls=["https://huggingface.co/papers/2602.10231", "https://huggingface.co/papers/1706.04599"],
        )

    def _compute(self, predictions, references, groups=None, num_resamples=1000, seed=0):
        q, c = _checked(predictions, references)
        if num_resamples < 2:
            raise ValueError(f"`num_resamples={num_resamples}`: a standard error needs at least 2 resamples.")
        if groups is not None and len(groups) != len(q):
            raise ValueError(f"`groups` has {len(groups)} entries, but there are {len(q)} samples: pass one for each.")
        bins = _bins(q)
        distinct, rank = np.unique(q, return_inverse=True)

        def scores(weights):
            """Accuracy, AUROC, Brier score and ECE of samples that count `weights` times."""
            n = weights.sum()
            right = np.bincount(rank, weights * c, len(distinct))
            wrong = np.bincount(rank, weights * (1 - c), len(distinct))
            pairs = right.sum() * wrong.sum()
            won = right @ (np.cumsum(wrong) - wrong / 2)  # wrong ones below, and half of those at the same confidence
            gaps = np.bincount(bins, weights * (c - q), len(LOWER_ENDS))
            return weights @ c / n, won / pairs if pairs else np.nan, weights @ (q - c) ** 2 / n, abs(gaps).sum() / n

        names = ("accuracy", "auroc", "brier", "ece")
        results = dict(zip(names, map(float, scores(np.ones(len(q)))), strict=True))

        # A resample is how often it holds each unit: a sample, or a group of them.
        unit = np.arange(len(q)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
        units = unit.max() + 1
        rng = np.random.default_rng(seed)
        resamples = (np.bincount(rng.integers(units, size=units), minlength=units) for _ in range(num_resamples))
        values = np.array([scores(times[unit].astype(float)) for times in resamples])
        for name, column in zip(names, values.T, strict=True):
            defined = column[~np.isnan(column)]  # a resample of one class has no AUROC
            known = units > 1 and len(defined) > 1 and not np.isnan(results[name])
            results[f"{name}_se"] = float(defined.std(ddof=1)) if known else float("nan")
        if groups is None and units > 1:
            results["accuracy_se"] = float(c.std(ddof=1) / np.sqrt(len(c)))

        count = np.bincount(bins, minlength=len(LOWER_ENDS))
        with np.errstate(invalid="ignore"):  # 0 / 0 of an empty bin is NaN
            means = [(np.bincount(bins, values, len(LOWER_ENDS)) / count).tolist() for values in (q, c)]
        confidence, accuracy = ([None if np.isnan(value) else value for value in values] for values in means)
        results = {name: None if np.isnan(value) else value for name, value in results.items()}
        lower, count = LOWER_ENDS.tolist(), count.tolist()
        return results | {"bins": {"lower": lower, "count": count, "confidence": confidence, "accuracy": accuracy}}


def _checked(predictions, references):
    """Both as arrays of float64."""
    q, c = np.asarray(predictions, dtype=float), np.asarray(references, dtype=float)
    if len(q) == 0:
        raise ValueError("`predictions` is empty: there is nothing to evaluate.")
    for name, values, valid, meaning in (
        ("predictions", q, (q >= 0) & (q <= 1), "a confidence in [0, 1]"),
        ("references", c, (c == 0) | (c == 1), "0 (wrong) or 1 (correct)"),
    ):
        if not valid.all():
            index = int(np.argmin(valid))
            raise ValueError(f"`{name}[{index}]` is {values[index]}: it must be {meaning}.")
    return q, c


def _bins(q):
    """Index of the bin of each confidence."""
    # In float32, in which 0.7 begins a bin whether it was computed in float32 (below 0.7) or in float64.
    bins = np.searchsorted(LOWER_ENDS.astype(np.float32), q.astype(np.float32), side="right") - 1
    return np.minimum(bins, np.where(q < 1, 9, 10))  # what float32 rounds to 1 is not 1
