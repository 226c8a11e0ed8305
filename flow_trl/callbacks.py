"""Callbacks and figures for diffusion training: moving average, on-policy check, learning curve, over-optimisation."""

import logging
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from .engines import gathered, part, trained
from .pictures import read_grid, saved_grids
from .utils import import_extra


logger = logging.getLogger(__name__)

LARGEST_DEVIATION, LARGEST_CLIPPED_SHARE = 1e-2, 1e-2  # of and by ratios that must be 1


def _evaluations(log_history: list[dict]) -> list[dict]:
    """The evaluations of a run, of a single data set, in order."""
    return [entry for entry in log_history if "eval_reward" in entry]


def _mean_rewards(logged: Iterable[str]) -> dict[str, str]:
    """Which of the logged names are means of a reward function, by the function's name."""
    keys = [key for key in logged if key.startswith("eval_rewards/") and key.endswith("/mean")]
    return {key.removeprefix("eval_rewards/").removesuffix("/mean"): key for key in keys}


def error_name(name: str) -> str:
    """The name under which the standard error of a mean reward is logged."""
    return f"{name.removesuffix('/mean')}/se" if name.endswith("/mean") else f"{name}_se"


def _figure(purpose: str, rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its panels, which are so large each."""
    figures = import_extra("matplotlib.figure", extra="plots", purpose=purpose)
    figure = figures.Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _plot(axes: Any, entries: list[dict], x: str, y: str, **options: Any) -> list[dict]:
    """Draws `y` over `x` with standard errors, where it was evaluated; returns these entries."""
    points = [entry for entry in entries if y in entry]
    errors = [entry.get(error_name(y), np.nan) for entry in points]
    axes.errorbar([entry[x] for entry in points], [entry[y] for entry in points], yerr=errors, marker="o", **options)
    axes.grid(alpha=0.3)
    axes.locator_params(axis="x", nbins=5)
    return points


class EMACallback(TrainerCallback):
    r"""
    Keeps an exponential moving average of the trained weights,
    \\( \bar\theta \leftarrow d\, \bar\theta + (1 - d)\, \theta \\), starting from the initial weights.

    Args:
        parameters (`dict[str, torch.nn.Parameter]`):
            The trained parameters by name.
        decay (`float`):
            Decay d, in (0, 1).
        update_steps (`int`):
            Number of optimizer updates between two steps of the average.

    Example:

    ```python
    >>> ema = EMACallback(dict(model.named_parameters()), decay=0.9, update_steps=8)
    >>> with ema.applied():  # here the model has the averaged weights
    ...     evaluate(model)
    ```
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decay: float, update_steps: int):
        self.parameters = parameters
        self.decay, self.update_steps = decay, update_steps
        self.averages = {name: weight.detach().clone() for name, weight in parameters.items()}

    def on_train_begin(self, args, state, control, **kwargs):
        share = self.decay ** (state.max_steps // self.update_steps)  # of the initial weights at the end
        if share > 0.5:
            logger.warning(
                "`ema_decay=%g` with `ema_update_steps=%d`: after the %d updates of this run the averaged weights, which are evaluated, "
                "saved and published, are to %.0f%% those from before training. Set `ema_decay=0`, or a smaller `ema_update_steps`.",
                *(self.decay, self.update_steps, state.max_steps, 100 * share),
            )

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.update_steps == 0:
            for name, average in self.averages.items():
                average.sub_((1 - self.decay) * (average - trained(self.parameters[name])))

    @contextmanager
    def applied(self):
        """Within this context the parameters hold their averages."""
        with gathered(self.parameters.values()):
            stored = {name: weight.detach().to("cpu", copy=True) for name, weight in self.parameters.items()}
            self._write(self.averages)
        try:
            yield
        finally:
            with gathered(self.parameters.values()):
                self._write(stored)

    @torch.no_grad()
    def _write(self, values: dict[str, torch.Tensor]) -> None:
        for name, weight in self.parameters.items():
            weight.copy_(values[name])

    def follow(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Goes on with parameters that FSDP or DeepSpeed put in the place of those before."""
        self.parameters = parameters
        self.averages = {name: part(average, parameters[name]) for name, average in self.averages.items()}

    def load(self, path: str | Path) -> None:
        """Reads averages from a safetensors file."""
        tensors = load_file(path)
        for name, average in self.averages.items():
            average.copy_(part(tensors[name], average))


class OnPolicyCallback(TrainerCallback):
    """
    Ends a training that does not train what it samples: at the first update of a generation the weights are those that
    sampled it, so every probability ratio must be 1. Also logs how far the ratios of that update are from 1
    (`ratio/first_max_deviation`) and which share of the samples is clipped all the same (`clip_ratio/first_update`), and
    warns once if these are more than 1%: they train nothing, and no error would say so.

    Args:
        trainer ([`~flow_trl.trainer.diffusion_trainer.DiffusionTrainer`]):
            The trainer, which adds this callback by itself.

    Raises:
        RuntimeError: before the optimizer's step, if a ratio deviates by more than 0.01, or is NaN.
    """

    def __init__(self, trainer: Any):
        self.trainer, self._has_warned = trainer, False

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step % self.trainer._updates_per_generation:
            return
        names = ("ratio/max_deviation", "clip_ratio/region_mean")
        of_update = [torch.stack(self.trainer._metrics[name][-args.gradient_accumulation_steps :]) for name in names]
        deviations, shares = self.trainer.accelerator.gather(torch.stack(of_update)[None]).unbind(1)
        deviation, share = deviations.max().item(), shares.mean().item()
        if not deviation <= LARGEST_DEVIATION:
            raise RuntimeError(
                f"At the first update of a generation a probability ratio is {deviation:.3g} away from 1: the denoiser computes "
                "something else in training than in sampling, so the gradient would be wrong. Usual causes: dropout or another "
                "random part of the call, a condition that is encoded anew, weights that changed in between, lower precision "
                "than the noise level allows."
            )
        self.trainer._record({"ratio/first_max_deviation": deviation, "clip_ratio/first_update": share})
        if share > LARGEST_CLIPPED_SHARE and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "At the first update of a generation %.1f%% of the samples are clipped by `epsilon=%g`, though the weights are those "
                "that sampled them: rounding alone moves the ratios by up to %.2g from 1, and what is clipped trains nothing. Set "
                "`epsilon=%.0e` or more, make batches alike (`per_device_rollout_batch_size` equal to "
                "`per_device_train_batch_size`), or compute in float32 (`bf16=False`, `fp16=False`).",
                100 * share, args.epsilon, deviation, 10 * deviation,
            )  # fmt: skip


class LearningCurveCallback(TrainerCallback):
    """
    Draws `learning_curve.png` in `output_dir`, after each evaluation and at the end: one panel for the reward that is
    trained, of the training images, which are sampled with noise, and of the held-out ones, which are not; and one for each
    reward function that is not the same thing, held out. `out_of_domain_rewards` are left to [`OverOptimizationCallback`].

    Raises:
        MissingExtraError: if matplotlib is not installed (extra `plots`).

    Example:

    ```python
    >>> trainer = TPGRPOTrainer(..., callbacks=[LearningCurveCallback()])
    ```
    """

    def __init__(self):
        import_extra("matplotlib.figure", extra="plots", purpose="the learning curve")

    def on_evaluate(self, args, state, control, **kwargs):
        self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._draw(args, state)

    def _draw(self, args: Any, state: Any) -> None:
        train = [entry for entry in state.log_history if "reward" in entry]
        if not state.is_world_process_zero or not train:
            return
        evaluations = _evaluations(state.log_history)
        panels = {"trained reward": "eval_reward"}
        # Out of domain they have scales of their own, and a figure by `OverOptimizationCallback`.
        out_of_domain = getattr(args, "out_of_domain_rewards", None) or []
        for name, key in sorted(_mean_rewards(key for entry in evaluations for key in entry).items()):
            is_trained_reward = all(entry.get(key) == entry["eval_reward"] for entry in evaluations)
            if name not in out_of_domain and not is_trained_reward:
                panels[name] = key
        figure, (row,) = _figure("the learning curve", 1, len(panels), 4.4, 3.6)
        for axes, (title, key) in zip(row, panels.items(), strict=True):
            if key == "eval_reward":
                label = "training images, sampled with noise"
                axes.plot(*zip(*[(entry["step"], entry["reward"]) for entry in train], strict=True), "C0", label=label)
            _plot(axes, evaluations, "step", key, color="C1", capsize=2, label="held out, without noise")
            axes.set_title(title)
            axes.set_xlabel("updates")
        for entry in [entry for entry in state.log_history if "total_nfe" in entry][-1:]:
            total = f"{entry['total_nfe']:,} denoiser evaluations, {entry['total_reward_calls']:,} scored images"
            figure.supxlabel(f"{entry['step']} updates took {total}", fontsize=9)
        row[0].legend(fontsize=8)
        figure.savefig(Path(args.output_dir) / "learning_curve.png", dpi=120)


def reward_table(log_history: list[dict]) -> str:
    """
    Compares the first and the last evaluation of a run.

    Args:
        log_history (`list[dict]`):
            `trainer.state.log_history`, with at least one evaluation.

    Returns:
        `str`: a table in Markdown, with a row for each reward function that is in both: mean before and after, the
        change, and the change in standard errors (of the difference, as if the images of both were independent).

    Example:

    ```python
    >>> print(reward_table(trainer.state.log_history))
    | reward                 | before | after  | change  | standard errors |
    | ---------------------- | ------ | ------ | ------- | --------------- |
    | scene                  |  0.712 |  0.773 |  +0.061 |            +5.2 |
    ```
    """
    evaluations = _evaluations(log_history)
    before, after = evaluations[0], evaluations[-1]
    lines = [
        f"| {'reward':<22} | before | after  | change  | standard errors |",
        f"| {'-' * 22} | ------ | ------ | ------- | --------------- |",
    ]
    for name, key in _mean_rewards(key for key in after if key in before).items():
        first, last, change = before[key], after[key], after[key] - before[key]
        error = math.hypot(before[error_name(key)], after[error_name(key)])
        lines.append(
            f"| {name:<22} | {first:6.3f} | {last:6.3f} | {change:+7.3f} | {change / max(error, 1e-9):+15.1f} |"
        )
    return "\n".join(lines)


def save_before_and_after(
    folder: str | Path,
    score: Callable[[list[Image.Image]], list[float]] | None = None,
    until: float = math.inf,
) -> None:
    """
    Writes `before_after.png`: the images of the first and the last evaluation of a run, of the same prompts and noise.

    Args:
        folder (`str` or `Path`):
            `output_dir` of the run, whose `images` has the grids.
        score (`Callable`, *optional*):
            Called with the images of a grid, it says how good each is. 1 is marked as right and 0 as wrong; another number is
            written below the image. By default that is the evaluation's reward.
        until (`int`, *optional*):
            The last update whose evaluation may be shown.

    Raises:
        MissingExtraError: if matplotlib is not installed (extra `plots`).

    Example:

    ```python
    >>> prompts = eval_dataset["prompt"][:16]
    >>> save_before_and_after(trainer.args.output_dir, lambda images: judge(prompts=prompts, images=images))
    ```
    """
    paths = saved_grids(folder, "eval-", until)
    grids = {
        when: [(image, caption) for image, caption in read_grid(path) if not caption.get("given")]
        for when, path in (("before", paths[0]), ("after", paths[-1]))
    }
    save_comparison(grids, Path(folder) / "before_after.png", score)


def save_comparison(
    grids: dict[str, list[tuple[Image.Image, dict[str, Any]]]],
    path: str | Path,
    score: Callable[[list[Image.Image]], list[float]] | None = None,
) -> None:
    """
    Writes images of two models one above the other, with their prompts above and how good they are below.

    Args:
        grids (`dict[str, list[tuple[PIL.Image.Image, dict]]]`):
            By the name of a model, its images with their `prompt` and `reward`; both of the same prompts. The first 16 are shown.
        path (`str` or `Path`):
            PNG file to write.
        score (`Callable`, *optional*):
            As in [`save_before_and_after`].

    Raises:
        MissingExtraError: if matplotlib is not installed (extra `plots`).

    Example:

    ```python
    >>> save_comparison({"base": [(image, {"prompt": "a cat", "reward": 0.5})], "LoRA": [(other, caption)]}, "both.png")
    ```
    """
    prompts = [caption["prompt"] for _, caption in list(grids.values())[-1]]
    columns, count = min(8, len(prompts)), min(16, len(prompts))
    blocks = -(-count // columns)
    figure, panels = _figure("the figure from before and after", 2 * blocks, columns, 1.7, 2.1)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[], frame_on=False)
    for when, (label, shown) in enumerate(grids.items()):
        images, captions = zip(*shown, strict=True)
        marks = {} if score is None else {1.0: ("right", "tab:green"), 0.0: ("wrong", "tab:red")}
        scores = [caption.get("reward") for caption in captions] if score is None else score(list(images))
        for i in range(count):
            panel = panels[i // columns * 2 + when, i % columns]
            panel.imshow(images[i])
            if when == 0:
                panel.set_title(textwrap.fill(prompts[i].removeprefix("a photo of "), 22), fontsize=9)
            if i % columns == 0:
                panel.set_ylabel(label)
            if scores[i] is not None:
                text, color = marks.get(scores[i], (f"{scores[i]:.3g}", "black"))
                panel.set_xlabel(text, color=color, fontsize=9)
    figure.savefig(path, dpi=100)


def cross_reward_figure(curves: dict[str, list[list[dict]]], names: list[str]) -> Any:
    """
    Draws rewards that are not trained against the one that is, over the evaluations of one or more runs: where a
    reward falls while the trained one rises, a run over-optimises.

    There is one panel for each reward and one colour for each method, with one point for each evaluation, joined in
    order. The first and the last point bear their number of updates; the bars are standard errors over the prompts.

    Args:
        curves (`dict[str, list[list[dict]]]`):
            By the name of a method, its runs, each with its evaluations as in `trainer.state.log_history`; other entries
            are ignored, so a whole `log_history` will do.
        names (`list[str]`):
            Names of the reward functions that are not trained.

    Returns:
        `matplotlib.figure.Figure`: the figure, not yet saved.

    Raises:
        MissingExtraError: if matplotlib is not installed (extra `plots`).

    Example:

    ```python
    >>> histories = {"DDPO": [ddpo.state.log_history], "TDPO-R": [tdpo_r.state.log_history]}
    >>> cross_reward_figure(histories, ["pickscore", "clip_score"]).savefig("cross_reward.png")
    ```
    """
    figure, (row,) = _figure("the cross-reward figure", 1, len(names), 4.2, 3.6)
    for axes, name in zip(row, names, strict=True):
        key = f"eval_rewards/{name}/mean"
        for index, (label, runs) in enumerate(curves.items()):
            color = f"C{index}"  # the same in every panel, also where a run lacks a reward
            for number, history in enumerate(runs):
                options = {"color": color, "ecolor": (color, 0.4), "label": "_nolegend_" if number else label}
                points = _plot(axes, _evaluations(history), "eval_reward", key, **options)
                for end in points[:1] + points[1:][-1:]:
                    place = (end["eval_reward"], end[key])
                    axes.annotate(end["step"], place, (4, 4), textcoords="offset points", color=color, fontsize=8)
        axes.set_xlabel("reward (trained)")
        axes.set_ylabel(f"{name} (not trained)")
        axes.margins(x=0.1)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(curves))
    return figure


class OverOptimizationCallback(TrainerCallback):
    r"""
    Watches the rewards that are not trained (`out_of_domain_rewards` of the config). After each evaluation it draws
    them against the trained one, as `over_optimization.png` in `output_dir`, and adds to the metrics, for each of
    them, how much it has fallen from its best evaluation so far, as a share of that best value b:

    \\( (b - \text{now}) / |b| \\), logged as `eval_over_optimization/<name>`; 0 where b is 0.

    It watches a single `eval_dataset`, not a dict of them. The best evaluation is taken from `state.log_history`, so a
    resumed run goes on with it. A share has little meaning for a reward whose values are around 0 (ImageReward's, for
    example): look at the picture for those.

    The metrics are what `trainer.evaluate` returns and what `state.log_history` holds. Trackers do not get the shares:
    they have been sent the evaluation before callbacks see it.

    Args:
        stop_after_fall (`float`, *optional*):
            Stops training as soon as one of these rewards has fallen by this share or more, in (0, 1], while the
            trained reward is at least as high as it was at that reward's best evaluation. By default training goes on.

    Raises:
        ValueError: if `stop_after_fall` is not in (0, 1], or, when it begins, if `out_of_domain_rewards` is not set.
        MissingExtraError: if matplotlib is not installed (extra `plots`).

    Example:

    ```python
    >>> config = TDPORConfig(..., out_of_domain_rewards=["pickscore", "clip_score"])
    >>> trainer = TDPORTrainer(..., args=config, callbacks=[OverOptimizationCallback(stop_after_fall=0.1)])
    ```
    """

    def __init__(self, stop_after_fall: float | None = None):
        if stop_after_fall is not None and not 0 < stop_after_fall <= 1:
            raise ValueError(
                f"`stop_after_fall={stop_after_fall}`: pass a share of the best value, in (0, 1], or None."
            )
        # Missing it is better known now than at the first evaluation.
        import_extra("matplotlib.figure", extra="plots", purpose="the figure of over-optimisation")
        self.stop_after_fall = stop_after_fall

    def on_train_begin(self, args, state, control, **kwargs):
        self._names(args)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        names = self._names(args)
        if "eval_reward" not in metrics:
            warnings.warn(
                "`eval_dataset` is a dict, whose evaluations `OverOptimizationCallback` does not watch: pass one data set.",
                stacklevel=2,
            )
            return
        evaluations = _evaluations(state.log_history)
        now = evaluations[-1]
        for name in names:
            key = f"eval_rewards/{name}/mean"
            if key not in now:
                continue
            best = max((entry for entry in evaluations if key in entry), key=lambda entry: entry[key])
            fall = (best[key] - now[key]) / abs(best[key]) if best[key] else 0.0
            metrics[f"eval_over_optimization/{name}"] = now[f"eval_over_optimization/{name}"] = fall
            rises = now["eval_reward"] >= best["eval_reward"]
            if self.stop_after_fall is not None and fall >= self.stop_after_fall and rises:
                logger.warning(
                    "Training stops at step %d: the reward %r, which is not trained, has fallen by %.1f%% since step "
                    "%d, while the trained reward went from %.4g to %.4g.",
                    now["step"], name, 100 * fall, best["step"], best["eval_reward"], now["eval_reward"],
                )  # fmt: skip
                control.should_training_stop = True
        if state.is_world_process_zero:
            figure = cross_reward_figure({Path(args.output_dir).name: [evaluations]}, names)
            figure.savefig(Path(args.output_dir) / "over_optimization.png", dpi=120)

    @staticmethod
    def _names(args: Any) -> list[str]:
        names = getattr(args, "out_of_domain_rewards", None)  # language-model configs have no such field
        if not names:
            raise ValueError(
                f"`out_of_domain_rewards={names}`: `OverOptimizationCallback` has nothing to watch. Set it in the "
                "config to the names of reward functions that are not trained."
            )
        return names
