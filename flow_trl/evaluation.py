"""
Evaluation of language models that answer with a confidence, or in two attempts.

[`evaluate_confidence`] and [`evaluate_two_attempts`] sample several completions per prompt and score them.
[`sample_completions`], [`score_confidence`] and [`score_two_attempts`] do one of both, for completions that are kept or
come from elsewhere. [`reliability_diagram`] draws what was found.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import is_conversational, maybe_apply_chat_template

from . import metrics
from .rewards.text import (
    Correct,
    completion_text,
    confidence_format_reward,
    correctness_reward,
    math_correct,
    parse_confidence,
    read_answer,
    read_attempts,
    two_attempts_format_reward,
)
from .utils import import_extra


if TYPE_CHECKING:
    from matplotlib.figure import Figure


logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, str]]


# Sampling


def sample_completions(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    num_samples: int = 16,
    max_new_tokens: int = 1024,
    temperature: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    chat_template_kwargs: dict[str, Any] | None = None,
    disable_tqdm: bool = False,
    **generate_kwargs: Any,
) -> list[list[str]]:
    """
    Samples completions by `model.generate`, in evaluation mode and without gradients.

    They come from the model's own distribution: its `generation_config`, which may cut or reshape that (`top_p`, `top_k`,
    `repetition_penalty`, ...), does not apply, except for the tokens that end a completion. The longest prompts come
    first, so memory that does not suffice shows at once. The global random state is left as it was.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. Prompts are padded on the left whatever its `padding_side`.
        prompts (`list[str]` or `list[list[dict]]`):
            Strings, or messages, to which the chat template is applied.
        num_samples (`int`, *optional*, defaults to `16`):
            Number of completions per prompt.
        max_new_tokens (`int`, *optional*, defaults to `1024`):
            Length at which a completion is cut off.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature; 0 takes the likeliest token at each step.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of completions that are generated together.
        seed (`int`, *optional*, defaults to `0`):
            Equal arguments, this and `batch_size` among them, give equal completions.
        chat_template_kwargs (`dict`, *optional*):
            Passed to the chat template, for example `{"enable_thinking": False}`.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to show no progress bar.
        generate_kwargs:
            Passed to `model.generate`.

    Returns:
        `list[list[str]]`: `num_samples` completions for each prompt, without special tokens.

    Raises:
        ValueError: if a number is too small, or a prompt has no tokens.

    Example:

    ```python
    >>> completions = sample_completions(model, tokenizer, ["2 + 2 = "], num_samples=4, max_new_tokens=8)
    >>> len(completions), len(completions[0])
    (1, 4)
    ```
    """
    for name, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}={value}`: it must be at least 1.")
    if temperature < 0:
        raise ValueError(f"`temperature={temperature}`: it must be at least 0.")
    prompt_ids = []
    for index, prompt in enumerate(prompts):
        row = {"prompt": prompt}
        text = maybe_apply_chat_template(row, processing_class, **(chat_template_kwargs or {}))["prompt"]
        # The template writes the special tokens itself.
        ids = processing_class(text, add_special_tokens=not is_conversational(row))["input_ids"]
        if not ids:
            raise ValueError(f"`prompts[{index}]` is {prompt!r}, which has no tokens: there is nothing to continue.")
        prompt_ids.append(torch.tensor(ids))

    config = _generation_config(model, processing_class, max_new_tokens, temperature)
    order = sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index]))
    rows = [index for index in order for _ in range(num_samples)]
    completions = [[] for _ in prompt_ids]
    with (
        _ready_to_generate(model, config, seed),
        tqdm(total=len(rows), desc="Sampling", unit="completion", disable=disable_tqdm) as progress,
    ):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            ids = [prompt_ids[index] for index in batch]
            left = {"batch_first": True, "padding_side": "left"}
            input_ids = pad_sequence(ids, padding_value=config.pad_token_id, **left).to(model.device)
            attention_mask = pad_sequence([torch.ones_like(row) for row in ids], **left).to(model.device)
            output = model.generate(input_ids=input_ids, attention_mask=attention_mask, **generate_kwargs)
            texts = processing_class.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                completions[index].append(text)
            progress.update(len(batch))
    return completions


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    """The model's own distribution at this temperature, and the tokens that end a completion."""
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    ends = sorted({*ends, tokenizer.eos_token_id} - {None})
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0] if ends else 0
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=pad, **sampling)


@contextmanager
def _ready_to_generate(model: PreTrainedModel, config: GenerationConfig, seed: int):
    """Evaluation mode, this generation config and random states from this seed; afterwards all is as before."""
    training = [module for module in model.modules() if module.training]
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    generation_config = base.generation_config
    accelerator = torch.accelerator.current_accelerator() or torch.device("cuda")
    devices = range(torch.accelerator.device_count())
    with torch.no_grad(), torch.random.fork_rng(devices, device_type=accelerator.type):
        torch.manual_seed(seed)
        model.eval()
        base.generation_config = config
        try:
            yield
        finally:
            base.generation_config = generation_config
            for module in training:
                module.training = True


# An answer and the confidence in it


def evaluate_confidence(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    correct: Correct = math_correct,
    num_samples: int = 16,
    k: Sequence[int] | None = None,
    resample_prompts: bool = False,
    num_resamples: int = 1000,
    seed: int = 0,
    **sampling_kwargs: Any,
) -> dict[str, Any]:
    """
    Samples completions with a confidence ([`sample_completions`]) and scores them ([`score_confidence`]).

    The defaults are the setting of [Blockwise Advantage Estimation](https://huggingface.co/papers/2602.10231): 16
    completions per prompt at temperature 1, and 1000 bootstrap resamples of the samples.

    The arguments that are not listed are those of these two functions.

    Args:
        dataset ([`~datasets.Dataset`]):
            Has the columns `prompt`, which asks for the layout of a completion, and `answer`, the right answer.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling and of the bootstrap.
        sampling_kwargs:
            Passed to [`sample_completions`]: `max_new_tokens`, `temperature`, `batch_size`, ...

    Returns:
        `dict`: as of [`score_confidence`].

    Raises:
        ValueError: if the data set is empty or lacks a column, or if an argument does not fit.

    Example:

    ```python
    >>> dataset = confidence_task().prepare(load_dataset("HuggingFaceH4/MATH-500", split="test"))
    >>> results = evaluate_confidence(model, tokenizer, dataset, max_new_tokens=2048)
    >>> print(f"{results['accuracy']:.3f} {results['auroc']:.3f} {results['ece']:.3f} {results['brier']:.3f}")
    ```
    """
    prompts, answers = _columns(dataset)
    completions = sample_completions(
        model, processing_class, prompts, num_samples=num_samples, seed=seed, **sampling_kwargs
    )
    return score_confidence(
        completions,
        answers,
        correct=correct,
        k=k,
        resample_prompts=resample_prompts,
        num_resamples=num_resamples,
        seed=seed,
    )


def score_confidence(
    completions: Sequence[Sequence[str]],
    answers: Sequence[str],
    *,
    correct: Correct = math_correct,
    k: Sequence[int] | None = None,
    resample_prompts: bool = False,
    num_resamples: int = 1000,
    seed: int = 0,
    strict: bool = False,
) -> dict[str, Any]:
    """
    Scores completions with the layout
    `<reasoning>..</reasoning><answer>..</answer><analysis>..</analysis><confidence>q</confidence>`: how often they are
    right, how well their confidences agree with that (`metrics/calibration`), and what choosing among the answers to a
    prompt brings (`metrics/confidence_voting`).

    A completion without a readable confidence has said nothing that could be calibrated: it counts for `accuracy`,
    `pass@k` and the votes (with weight 0), but not for `auroc`, `brier`, `ece` and `bins`. Putting in a number would
    flatter or damn the model by that number's choice: 0 is a perfect confidence for a completion that was cut off
    without an answer. So read these beside `unparsable`, or take `brier_strict`, in which it costs the worst score.

    Args:
        completions (`list[list[str]]`):
            Completions of each prompt, one or more.
        answers (`list[str]`):
            The right answer to each prompt.
        correct (`Callable`, *optional*, defaults to [`~rewards.text.math_correct`]):
            `correct(prediction, answer) -> bool`. Answers to a prompt vote together where it says that they are equal.
        k (`list[int]`, *optional*):
            Values of k for pass@k. By default the powers of two up to the number of completions of each prompt.
        resample_prompts (`bool`, *optional*, defaults to `False`):
            Whether the bootstrap resamples prompts. By default it resamples samples, as the paper does, which gives
            smaller standard errors: samples of a prompt resemble each other.
        num_resamples (`int`, *optional*, defaults to `1000`):
            Number of bootstrap resamples, at least 2.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.
        strict (`bool`, *optional*, defaults to `False`):
            How answers and confidences are read ([`~rewards.text.parse_confidence`]).

    Returns:
        `dict`: numbers in [0, 1], and the bins. What is a score has its standard error beside it as `{name}_se`.

        - `accuracy`: share of correct completions, with a standard error over samples. `pass@1` is the mean over prompts,
          with one over prompts; both are the same number where each prompt has as many completions.
        - `auroc`, `brier`, `ece`: of the readable confidences; NaN if there are none. Standard errors by bootstrap.
        - `brier_strict`: the Brier score with 1 for a missing confidence: minus the mean of
          [`~rewards.text.brier_reward`]. No standard error.
        - `pass@{k}`, `majority`, `highest_confidence`, `weighted_majority`: standard errors over prompts.
        - `unparsable`: share of completions without a readable confidence. No standard error.
        - `num_completions`, `num_confidences`: how many there are, and how many have a readable confidence.
        - `format`: share of completions with exactly the layout. No standard error.
        - `bins`: what [`reliability_diagram`] draws.

    Raises:
        ValueError: if there are no prompts or not as many answers, if a prompt has no completions, or if an argument
            does not fit.

    Example:

    ```python
    >>> layout = "<reasoning></reasoning><answer>{}</answer><analysis></analysis><confidence>{}</confidence>"
    >>> completions = [[layout.format(4, 0.9), layout.format(5, 0.2)], [layout.format(7, 0.8), layout.format(7, "?")]]
    >>> results = score_confidence(completions, ["4", "8"], correct=exact_match)
    >>> {name: results[name] for name in ("accuracy", "auroc", "highest_confidence", "unparsable")}
    {'accuracy': 0.25, 'auroc': 1.0, 'highest_confidence': 0.5, 'unparsable': 0.25}
    ```
    """
    texts = _texts(completions, answers)
    each = [answer for row, answer in zip(texts, answers, strict=True) for _ in row]
    right = np.array(correctness_reward([text for row in texts for text in row], each, correct=correct, strict=strict))
    confidences = [[parse_confidence(text, strict) for text in row] for row in texts]
    flat = [confidence for row in confidences for confidence in row]
    stated = np.array([confidence is not None for confidence in flat])
    lengths = [len(row) for row in texts]
    prompt = np.repeat(np.arange(len(texts)), lengths)
    results = _numbers(metrics.summarize("accuracy", right))

    names = [f"{name}{suffix}" for name in ("auroc", "brier", "ece") for suffix in ("", "_se")]
    calibration: dict[str, Any] = dict.fromkeys(names, math.nan)
    calibration["bins"] = {"lower": [], "count": [], "confidence": [], "accuracy": []}
    if stated.any():
        calibration = _metric(
            "calibration",
            predictions=[confidence for confidence in flat if confidence is not None],
            references=right[stated],
            groups=prompt[stated] if resample_prompts else None,
            num_resamples=num_resamples,
            seed=seed,
        )
    results |= {name: calibration[name] for name in names}
    losses = [1.0 if q is None else (q - c) ** 2 for q, c in zip(flat, right, strict=True)]
    results["brier_strict"] = float(np.mean(losses))

    results |= _metric(
        "confidence_voting",
        predictions=[_merge([read_answer(text, strict) for text in row], correct) for row in texts],
        references=[str(answer) for answer in answers],
        confidences=confidences,
        correct=np.split(right, np.cumsum(lengths)[:-1]),
        k=[2**power for power in range(min(lengths).bit_length())] if k is None else k,
    )
    results["unparsable"] = 1 - stated.mean().item()
    results |= {"num_completions": len(stated), "num_confidences": int(stated.sum())}
    if 2 * stated.sum() < len(stated):
        logger.warning(
            f"Only {stated.sum()} of {len(stated)} completions have a readable confidence: AUROC, Brier score and ECE say "
            "nothing of the others."
        )
    results["format"] = float(np.mean([score for row in texts for score in confidence_format_reward(row)]))
    results["bins"] = calibration["bins"]
    return results


def _merge(answers: list[str | None], correct: Correct) -> list[str | None]:
    """Answers that are equal by `correct` as one string, whatever their order."""
    kept: dict[str, str] = {}
    for answer in sorted({answer for answer in answers if answer}):
        kept[answer] = next((other for other in dict.fromkeys(kept.values()) if correct(answer, other)), answer)
    return [kept.get(answer) for answer in answers]


def _metric(name: str, **inputs: Any) -> dict[str, Any]:
    return _numbers(metrics.load(name, keep_in_memory=True).compute(**inputs))


def _numbers(results: dict[str, Any]) -> dict[str, Any]:
    """Results of a metric, numbers throughout: NaN where it has none."""
    return {name: math.nan if value is None else value for name, value in results.items()}


# Two attempts


def evaluate_two_attempts(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    correct: Correct = math_correct,
    num_samples: int = 16,
    **sampling_kwargs: Any,
) -> dict[str, float]:
    """
    Samples completions with two attempts ([`sample_completions`]) and scores them ([`score_two_attempts`]).

    The arguments are those of [`evaluate_confidence`]; `seed` is that of the sampling, passed on like the others.

    Returns:
        `dict[str, float]`: as of [`score_two_attempts`].

    Raises:
        ValueError: if the data set is empty or lacks a column, or if an argument does not fit.

    Example:

    ```python
    >>> dataset = two_attempt_task().prepare(load_dataset("HuggingFaceH4/MATH-500", split="test"))
    >>> evaluate_two_attempts(model, tokenizer, dataset)["gain"]
    ```
    """
    prompts, answers = _columns(dataset)
    completions = sample_completions(model, processing_class, prompts, num_samples=num_samples, **sampling_kwargs)
    return score_two_attempts(completions, answers, correct=correct)


def score_two_attempts(
    completions: Sequence[Sequence[str]], answers: Sequence[str], *, correct: Correct = math_correct
) -> dict[str, float]:
    """
    Scores completions with two attempts, each with an `<answer>`: `<first_attempt>..</first_attempt>`, then
    `<second_attempt>` likewise.

    Args:
        completions, answers:
            As for [`score_confidence`].
        correct (`Callable`, *optional*, defaults to [`~rewards.text.math_correct`]):
            `correct(prediction, answer) -> bool`. It also says whether both attempts have the same answer.

    Returns:
        `dict[str, float]`: means over prompts of shares of their completions, each with its standard error over prompts
        as `{name}_se`. A missing answer is wrong.

        - `first_accuracy`, `second_accuracy`: the attempt is correct.
        - `gain`: the second accuracy less the first one, in [-1, 1].
        - `right_to_wrong`, `wrong_to_right`: only the first attempt is correct, only the second is.
        - `changed`: both attempts have an answer, and not the same.
        - `format`: the completion has exactly the layout.

    Raises:
        ValueError: if there are no prompts or not as many answers, or if a prompt has no completions.

    Example:

    ```python
    >>> text = "<first_attempt><answer>{}</answer></first_attempt><second_attempt><answer>{}</answer></second_attempt>"
    >>> results = score_two_attempts([[text.format(5, 4), text.format(4, 4)]], ["4"], correct=exact_match)
    >>> results["first_accuracy"], results["second_accuracy"], results["wrong_to_right"]
    (0.5, 1.0, 0.5)
    ```
    """
    shares = {}
    for row, answer in zip(_texts(completions, answers), answers, strict=True):
        pairs = [read_attempts(text) for text in row]
        c_1, c_2 = np.array([[float(correct(attempt, answer)) for attempt in pair] for pair in pairs]).T
        scores = {
            "first_accuracy": c_1,
            "second_accuracy": c_2,
            "gain": c_2 - c_1,
            "right_to_wrong": c_1 * (1 - c_2),
            "wrong_to_right": (1 - c_1) * c_2,
            "changed": [bool(first and second and not correct(second, first)) for first, second in pairs],
            "format": two_attempts_format_reward(row),
        }
        for name, values in scores.items():
            shares.setdefault(name, []).append(np.mean(values))
    results = {}
    for name, values in shares.items():
        results |= _numbers(metrics.summarize(name, values))
    return results


# Reliability diagram


def reliability_diagram(results: Mapping[str, Any], path: str | Path | None = None) -> "Figure":
    """
    Draws accuracy against confidence, bin by bin, and below how many samples each bin holds.

    On the diagonal accuracy and confidence agree; below it the model is too sure. Where not all completions have a
    confidence, the legend says how many have.

    Args:
        results (`dict`):
            What [`score_confidence`], [`evaluate_confidence`] or `metrics/calibration` returned, or several of these by
            name: `{"RLCR": ..., "outcome baseline": ...}`. Of each, `bins` and `ece` are used.
        path (`str` or `Path`, *optional*):
            PNG file to write; its folder is made.

    Returns:
        `matplotlib.figure.Figure`: the diagram.

    Raises:
        MissingExtraError: if matplotlib is not installed (extra `plots`).

    Example:

    ```python
    >>> reliability_diagram({"before": before, "after": after}, "reliability.png")
    ```
    """
    module = import_extra("matplotlib.figure", extra="plots", purpose="the reliability diagram")
    curves = {"": results} if "bins" in results else results
    figure = module.Figure(figsize=(5, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="gray", linestyle="--", linewidth=1, zorder=1)
    for i, (name, curve) in enumerate(curves.items()):
        bins = {key: np.asarray(values, dtype=float) for key, values in curve["bins"].items()}
        filled = bins["count"] > 0
        stated, total = int(bins["count"].sum()), curve.get("num_completions")
        ece = f"ECE {curve['ece']:.3f}" + (f", of {stated} of {total}" if total not in (None, stated) else "")
        label = f"{name} ({ece})" if name else ece
        upper.plot(bins["confidence"][filled], bins["accuracy"][filled], marker="o", markersize=4, label=label)
        width = 0.09 / len(curves)
        lower.bar(bins["lower"] + 0.005 + i * width, bins["count"], width, align="edge")
    upper.set(ylabel="accuracy", xlim=(-0.01, 1.11), ylim=(-0.02, 1.02))
    upper.legend()
    lower.set(ylabel="samples", xlabel="confidence", xticks=np.arange(11) / 10)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    return figure


def save_results(results: Mapping[str, Mapping[str, Any]], folder: str | Path) -> None:
    """
    Leaves evaluations where a trainer's card finds them: `results.json` (NaN as null) and, of confidences,
    `reliability_diagram.png`.

    Args:
        results (`dict[str, dict]`):
            What [`score_confidence`] or [`score_two_attempts`] returned, by name: `"before"`, on the same problems,
            and `"after"`.
        folder (`str` or `Path`):
            `output_dir` of the run.

    Raises:
        MissingExtraError: if matplotlib is not installed (extra `plots`), after `results.json` was written.

    Example:

    ```python
    >>> save_results({"before": before, "after": after}, trainer.args.output_dir)
    ```
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    valid = json.loads(json.dumps(results), parse_constant=lambda nan: None)
    (folder / "results.json").write_text(json.dumps(valid, indent=2), encoding="utf-8")
    if all("bins" in result for result in results.values()):
        reliability_diagram(results, folder / "reliability_diagram.png")


# Shared


def _columns(dataset: Dataset) -> tuple[list[Prompt], list[str]]:
    for column in ("prompt", "answer"):
        if column not in dataset.column_names:
            raise ValueError(
                f"The data set has no column {column!r}, only {', '.join(map(repr, dataset.column_names))}: `prepare` of "
                "a task in `flow_trl.tasks` makes it."
            )
    if len(dataset) == 0:
        raise ValueError("`dataset` is empty: there is nothing to evaluate.")
    return list(dataset["prompt"]), list(dataset["answer"])


def _texts(completions: Sequence[Sequence[str]], answers: Sequence[str]) -> list[list[str]]:
    if len(completions) == 0 or len(completions) != len(answers):
        raise ValueError(
            f"`completions` has {len(completions)} prompts and `answers` {len(answers)}: both need one entry per prompt, "
            "and one prompt or more."
        )
    for index, row in enumerate(completions):
        if isinstance(row, str) or len(row) == 0:
            raise ValueError(f"`completions[{index}]` is {row!r}: it must be a list of one or more completions.")
    return [[completion_text(completion) for completion in row] for row in completions]
