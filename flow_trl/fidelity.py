"""
How good a credit is, without training: its correlation with the true advantage of each denoising step, which continuations
of the sampled trajectories estimate, and what it costs.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd
import torch
from tqdm.auto import tqdm

from .credit import control_variate_rewards, incremental_rewards, turning_point_rewards
from .generation import ScoringError
from .rollout import Trajectory, rollout
from .trainer.ddpo_trainer import DDPOTrainer
from .utils import import_extra, sample_generator


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .conditioning import Conditioning
    from .generation import Chunk, Sampled
    from .trainer.tp_grpo_trainer import TPGRPOTrainer


# An update of one step evaluates forwards and backwards, which takes about three times as long as forwards.
EVALUATIONS_PER_TRAINED_STEP = 3
NUM_RESAMPLES = 2000


# Rewards (N, K) of the steps from those (N, K + 1) of the completions
_CREDITS = {
    "incremental": lambda rewards, n: incremental_rewards(rewards),
    "turning_point": lambda rewards, n: turning_point_rewards(rewards, consistent=False).step_rewards,
    "consistent": lambda rewards, n: turning_point_rewards(rewards).step_rewards,
    "control_variate": control_variate_rewards,
    "outcome_control_variate": partial(control_variate_rewards, outcome=True),
}
_CREDITS_OF_JUMPS = ["outcome_control_variate"]


@dataclass
class CreditFidelity:
    """
    What [`credit_fidelity`] measured.

    Args:
        table (`pandas.DataFrame`): one row per credit and stride, with the columns

            - `credit`, `stride`: arguments of [`TPGRPOConfig`]; the stride of `"outcome"` is "-";
            - `fidelity`, `fidelity_se`: squared correlation with the true advantage, mean over the steps, in [0, 1], and its
              standard error;
            - `evaluations`, `images`, `seconds`: cost per trained image: denoiser evaluations in sampling, scored images,
              seconds of sampling, decoding, scoring and an (estimated) update;
            - `per_evaluation`, `per_second`, each with `_se`: fidelity per cost, that of `"outcome"` being 1. The first
              counts evaluations in sampling and three for each trained step.
        steps (`pandas.DataFrame`): squared correlation of each step, same rows.
        ceiling (`list[float]`): squared correlation of the Monte-Carlo advantages themselves with the true ones, of each
            step: the others are too low by this factor. More continuations bring it nearer to 1.
    """

    table: pd.DataFrame
    steps: pd.DataFrame
    ceiling: list[float]

    def advice(self) -> str:
        """In words: which credit is best for its price, and whether completions are worth theirs."""
        table = self.table
        best = table.loc[table["per_second"].idxmax()]
        free = table[table["stride"].isin(["-", "jump"])]
        free = free.loc[free["per_second"].idxmax()]

        def name(row) -> str:
            stride = "" if row["stride"] == "-" else f", completion_stride={row['stride']!r}"
            return f"credit={row['credit']!r}{stride}"

        lines = [
            f"Most fidelity for the time: {name(best)}, {best['per_second']:.1f} ± {best['per_second_se']:.1f} times that of "
            "the outcome."
        ]
        margin = best["per_second"] - free["per_second"]
        if margin <= math.hypot(best["per_second_se"], free["per_second_se"]):
            lines.append(
                f"Completions that cost evaluations are not worth it here: {name(free)} does as well within the error."
            )
            if free["credit"] == "outcome":
                if "jump" in table["stride"].tolist():
                    lines.append("Nor are images that step straight to noise level 0.")
                lines.append("Train with FlowGRPOTrainer.")
        if min(self.ceiling) < 0.3:
            lines.append(
                "The Monte-Carlo advantages of some steps are mostly noise: use more continuations before you trust this."
            )
        return " ".join(lines)

    def figure(self) -> "Figure":
        """Fidelity against cost, in evaluations and in seconds."""
        figure_class = import_extra("matplotlib.figure", "plots", "A figure of fidelity").Figure
        figure = figure_class(figsize=(10, 4), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        steps = len(self.steps.columns) * EVALUATIONS_PER_TRAINED_STEP
        costs = {
            f"denoiser evaluations per image, with {steps} for the update": self.table["evaluations"] + steps,
            "seconds per image": self.table["seconds"],
        }
        markers = dict(zip(self.table["credit"].unique(), "osD^vP", strict=False))
        for panel, (label, cost) in zip(panels, costs.items(), strict=True):
            for number, (credit, rows) in enumerate(self.table.groupby("credit", sort=False)):
                panel.errorbar(
                    cost[rows.index], rows["fidelity"], rows["fidelity_se"],
                    fmt=f"{markers[credit]}:", color=f"C{number}", capsize=2, label=credit,
                )  # fmt: skip
                for index, row in rows.iterrows():
                    text = "" if row["stride"] == "-" else str(row["stride"])
                    panel.annotate(
                        text, (cost[index], row["fidelity"]), (4, 4), textcoords="offset points", fontsize=8
                    )
            panel.set_xlabel(label)
            panel.set_xlim(left=0)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("squared correlation with\nthe true advantage of a step")
        panels[0].legend(title="credit (numbers: stride)", fontsize=8)
        return figure


def credit_fidelity(
    trainer: "TPGRPOTrainer",
    *,
    num_prompts: int = 16,
    num_continuations: int = 16,
    strides: tuple[int | str, ...] = (1, 2, 3, "jump"),
    seed: int = 0,
    disable_tqdm: bool = False,
) -> CreditFidelity:
    r"""
    Measures how well each credit tells what a denoising step really earned, and at which price: in minutes, and before
    anything is trained.

    The true advantage of step k is \\( A^*_k = E[R_K \mid x_k] - E[R_K \mid x_{k-1}] \\), where x_k are the latents after k
    stochastic steps and the expectation is over the noise of the others. Each expectation is the mean reward of
    `num_continuations` fresh continuations. A credit's fidelity at a step is its squared correlation with that, within the
    groups: the share of its samples that does useful work; half of it needs twice the samples.

    Everything else is as in training: pipeline, LoRA, rewards, steps, guidance, noise and `num_generations` are those of the
    trainer.

    Args:
        trainer ([`TPGRPOTrainer`]):
            A trainer with a `train_dataset`, before, after or between its training. It is not changed.
        num_prompts (`int`, *optional*, defaults to `16`):
            Number of prompts, at least 2, with `args.num_generations` images each.
        num_continuations (`int`, *optional*, defaults to `16`):
            Continuations from the latents before each stochastic step of each image, at least 2.
        strides (`tuple`, *optional*, defaults to `(1, 2, 3, "jump")`):
            Values of `completion_stride`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of prompts and noise.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to show no progress bar.

    Returns:
        [`CreditFidelity`]: standard errors are those of a bootstrap over prompts.

    Raises:
        TypeError: if the trainer is not one of flow-matching pipelines.
        ValueError: if an argument does not fit, if no image's reward differs from those of its group, or if there are
            several processes.

    Example:

    ```python
    >>> found = credit_fidelity(trainer)
    >>> print(found.table.to_markdown(index=False, floatfmt=".3f"))
    >>> print(found.advice())
    >>> found.figure().savefig("credit_fidelity.png")
    ```
    """
    if isinstance(trainer, DDPOTrainer):
        raise TypeError(f"`trainer` is a {type(trainer).__name__}: pass a TPGRPOTrainer or a FlowGRPOTrainer.")
    args, dataset = trainer.args, trainer.train_dataset
    available = 0 if dataset is None else len(dataset)
    if not 2 <= num_prompts <= available:
        raise ValueError(
            f"`num_prompts={num_prompts}`: it must be at least 2, for errors come from differences between prompts, and at most "
            f"{available}, the prompts of the trainer's `train_dataset`."
        )
    if num_continuations < 2:
        raise ValueError(f"`num_continuations={num_continuations}`: use at least 2, and 16 or more for low noise.")
    for stride in strides:
        if stride != "jump" and not (isinstance(stride, int) and stride >= 1):
            raise ValueError(f"`strides={strides}` has {stride!r}: a stride is a number from 1 on, or 'jump'.")
    if trainer.accelerator.num_processes > 1:
        raise ValueError("Credit fidelity is measured in one process: start the script without `accelerate launch`.")

    n, T, steps = args.num_generations, args.num_inference_steps, trainer._stochastic_steps(0)
    chosen = torch.randperm(available, generator=sample_generator(seed, "prompts"))[:num_prompts]
    rows = chosen.repeat_interleave(n).tolist()
    total = len(rows) * (1 + len(strides) + len(steps) * num_continuations)
    bar = tqdm(total=total, desc="Credit fidelity", unit="image", disable=disable_tqdm)

    def sampled(rows: list[int], first_step: int = 0, latents: torch.Tensor | None = None, **options) -> "Sampled":
        """Scored samples; sample i goes on from latents i, if there are any."""

        def sample(chunk: "Chunk", conditioning: "Conditioning", index: list[int]) -> Trajectory:
            own = range(chunk.first, chunk.first + len(chunk.rows))
            trajectory = rollout(
                trainer.policy,
                conditioning,
                index,
                [sample_generator(seed, first_step, latents is not None, image) for image in own],
                num_inference_steps=T,
                transition=trainer._transition,
                ode_step=trainer._ode_step,
                steps=range(max(first_step, steps.start), steps.stop),
                batch_size=args.per_device_rollout_batch_size,
                latents=None if latents is None else latents[own.start : own.stop],
                first_step=first_step,
                **options,
            )
            if latents is not None or options:  # only rewards are needed
                trajectory = trajectory._replace(latents=trajectory.latents.new_zeros(len(own), 0))
            return trajectory

        try:
            return trainer._sampler(
                dataset,
                rows,
                sample,
                batch_size=args.per_device_rollout_batch_size,
                decode_batch_size=args.per_device_decode_batch_size,
                finished_functions=trainer.scorer.trained,
                trainer_state=trainer.state,
                bar=bar,
            )
        except ScoringError as error:
            raise error.__cause__ from None

    def rewards_of(sampled: "Sampled") -> torch.Tensor:
        return trainer.scorer.weighted(sampled.scores).double()

    with bar, ExitStack() as restored:
        restored.callback(trainer.model.train, trainer.model.training)
        trainer.model.eval()
        outcome = sampled(rows)
        final, latents = rewards_of(outcome)[:, 0], outcome.trajectory.latents
        if (final.view(-1, n) == final.view(-1, n)[:, :1]).all():
            raise ValueError(
                f"All {n} images of each of the {num_prompts} prompts got the same reward: there is nothing that a step could "
                "have earned. Look at the reward functions, or take more prompts."
            )
        values, noise = [], []
        for k, step in enumerate(steps):
            repeated = [row for row in rows for _ in range(num_continuations)]
            from_latents = latents[:, k].repeat_interleave(num_continuations, dim=0)
            continued = rewards_of(sampled(repeated, step, from_latents)).view(len(rows), num_continuations)
            values.append(continued.mean(1))
            noise.append(continued.var(1) / num_continuations)
        values.append(final)  # nothing is random any more
        noise.append(torch.zeros_like(final))
        values, noise = torch.stack(values, dim=1), torch.stack(noise, dim=1)  # (N, K + 1)
        measured = [("outcome", "-", outcome, final[:, None].expand(-1, len(steps)))]
        for stride in strides:
            completed = sampled(rows, completions=True, completion_stride=T if stride == "jump" else stride)
            rewards = rewards_of(completed)
            credits = _CREDITS_OF_JUMPS if stride == "jump" else _CREDITS
            measured += [(credit, stride, completed, _CREDITS[credit](rewards, n)) for credit in credits]

    truth = _centred(values.diff(dim=1), n)
    ceiling = 1 - (noise[:, 1:] + noise[:, :-1]).mean(0) * (1 - 1 / n) / truth.square().mean((0, 1))
    table, squared = _compared(measured, truth, seed)
    return CreditFidelity(table, squared, ceiling.tolist())


def _compared(
    measured: list[tuple[str, int | str, "Sampled", torch.Tensor]], truth: torch.Tensor, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """
    Table and squared correlations, see [`CreditFidelity`], of credits (each with its stride, what was sampled for it
    and its rewards of the steps, the outcome first) against the true advantages (G, n, K).
    """
    num_prompts, n, K = truth.shape
    # The same prompts are drawn for all credits, so that their ratios have the errors of ratios.
    generator = sample_generator(seed, "bootstrap")
    drawn = torch.randint(num_prompts, (NUM_RESAMPLES, num_prompts), generator=generator)
    drawn = torch.nn.functional.one_hot(drawn, num_prompts).sum(1).double()  # how often each prompt was drawn
    outcome = measured[0][2]
    update_evaluations = EVALUATIONS_PER_TRAINED_STEP * K
    update_seconds = update_evaluations * outcome.seconds["sampling"] / outcome.evaluations
    table, of_steps, base = [], [], None
    for credit, stride, sampled, step_rewards in measured:
        products = _products(_centred(step_rewards, n), truth)
        squared = _squared_correlation(products.sum(1))
        resampled = _squared_correlation(torch.einsum("bg,cgk->cbk", drawn, products)).mean(1)
        timed = sum(sampled.seconds[name] for name in ("sampling", "decoding", "reward_wait"))
        row = {
            "credit": credit,
            "stride": stride,
            "fidelity": squared.mean().item(),
            "fidelity_se": resampled.std().item(),
            "evaluations": sampled.evaluations / (num_prompts * n),
            "images": sampled.scores.shape[1],
            "seconds": timed / (num_prompts * n) + update_seconds,
        }
        costs = {"per_evaluation": row["evaluations"] + update_evaluations, "per_second": row["seconds"]}
        if base is None:
            base = row["fidelity"], resampled, costs
        for name, cost in costs.items():
            cheaper = base[2][name] / cost
            row[name] = row["fidelity"] / base[0] * cheaper
            row[f"{name}_se"] = (resampled / base[1]).std().item() * cheaper
        table.append(row)
        of_steps.append(squared.tolist())
    return pd.DataFrame(table), pd.DataFrame(of_steps, columns=[f"step_{k}" for k in range(1, K + 1)])


def _centred(values: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Values (N, K) in groups (G, n, K), minus the mean of each."""
    groups = values.double().unflatten(0, (-1, num_generations))
    return groups - groups.mean(1, keepdim=True)


def _products(values: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Sums (3, G, K) over the images of a group: of products, of squares, of the truth's squares."""
    return torch.stack([(values * truth).sum(1), values.square().sum(1), truth.square().sum(1)])


def _squared_correlation(products: torch.Tensor) -> torch.Tensor:
    product, square, truth_square = products
    scale = square * truth_square
    return torch.where(scale > 0, product.square() / scale.where(scale > 0, 1.0), 0.0)
