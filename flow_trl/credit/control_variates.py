"""Rewards of denoising steps in which the completion before a step is a control variate."""

from typing import NamedTuple

import torch

from .groups import group_advantages
from .turning_points import check_completion_rewards


class ControlVariates(NamedTuple):
    """
    What [`control_variates`] found in `N` trajectories of `G` groups.

    Attributes:
        step_rewards (`torch.Tensor` of shape `(N, K)`):
            `R_k - beta_k R_{k-1}`.
        beta (`torch.Tensor` of shape `(G, K)`):
            The coefficient that each group's rewards were computed with, which the other groups determine.
        correlation (`torch.Tensor` of shape `(K,)`):
            Correlation rho_k, within groups, of the two rewards: the variance of a step's reward is `1 - rho_k^2` times
            that of `R_k`. 0 where one of them does not vary.
    """

    step_rewards: torch.Tensor
    beta: torch.Tensor
    correlation: torch.Tensor


def control_variates(rewards: torch.Tensor, num_generations: int, *, outcome: bool = False) -> ControlVariates:
    r"""
    The rewards of [`control_variate_rewards`], which has the arguments, with their coefficients and correlations.

    Example:

    ```python
    >>> import torch
    >>> from flow_trl.credit import control_variates

    >>> rewards = torch.tensor([[1.0, 1.0], [3.0, 2.0], [0.0, 5.0], [4.0, 9.0]])  # two groups of two, one step
    >>> control_variates(rewards, num_generations=2).beta
    tensor([[1.0000],
            [0.5000]])
    ```
    """
    R = check_completion_rewards(rewards)
    if num_generations < 2 or len(R) % num_generations:
        raise ValueError(
            f"`num_generations` is {num_generations}: it must be at least 2 and divide the {len(R)} rows of `rewards`, whose "
            "groups follow one another."
        )
    after = R[:, -1:].expand(-1, R.shape[1] - 1) if outcome else R[:, 1:]
    before = R[:, :-1]
    c_after, c_before = (
        group_advantages(values.double(), num_generations, scale_rewards="none").unflatten(0, (-1, num_generations))
        for values in (after, before)
    )  # (G, n, K)
    products, squares = (c_after * c_before).sum(1), c_before.square().sum(1)  # (G, K)
    other_products, other_squares = products.sum(0) - products, squares.sum(0) - squares
    # A sum over the others that is rounding alone says nothing.
    known = other_squares > 1e-12 * squares.sum(0)
    beta = torch.where(known, other_products / other_squares.where(known, 1.0), 0.0)
    scale = (squares.sum(0) * c_after.square().sum((0, 1))).sqrt()
    correlation = torch.where(scale > 0, products.sum(0) / scale.where(scale > 0, 1.0), 0.0)
    step_rewards = after - beta.repeat_interleave(num_generations, dim=0) * before
    return ControlVariates(*(values.to(R.dtype) for values in (step_rewards, beta, correlation)))


def control_variate_rewards(rewards: torch.Tensor, num_generations: int, *, outcome: bool = False) -> torch.Tensor:
    r"""
    The reward after each stochastic step, without what the state before the step already told of it:

    $$ y_k = R_k - \beta_k R_{k-1}, \qquad \beta_k = \frac{\sum c_k c_{k-1}}{\sum c_{k-1}^2}, \qquad c_k = R_k -
    \operatorname{mean}_\text{group}(R_k) $$

    `R_{k-1}` does not depend on the noise of step k, so whatever multiple of it is subtracted, the expected gradient stays;
    this one leaves the least variance, \\( 1 - \rho_k^2 \\) times that of `R_k`. `beta = 1` is the incremental reward of
    [TP-GRPO](https://huggingface.co/papers/2602.06422), `beta = 0` the reward of the completion.

    The sums run over all *other* groups, so a group's coefficient does not depend on its own samples; that keeps the
    gradient unbiased, and costs a share of about one in the number of the other samples in variance. Pass the whole
    generation, all processes' trajectories. A single group, or others that do not vary, leave `beta = 0`.

    Args:
        rewards (`torch.Tensor` of shape `(N, K + 1)`):
            `R_0, ..., R_K` of each trajectory as in [`incremental_rewards`]. Completions may be coarse, for only the
            correlation counts. Any finite values.
        num_generations (`int`):
            Size of a group, at least 2; divides `N`. Each `num_generations` consecutive rows are one prompt's group.
        outcome (`bool`, *optional*, defaults to `False`):
            Whether the sampled image's reward takes the place of the completion's: `y_k = R_K - beta_k R_{k-1}`. It is
            unbiased for any completions, also for those that step straight to noise level 0 and cost no evaluation.

    Returns:
        `torch.Tensor` of shape `(N, K)`: the rewards, float64 if `rewards` is, else float32.

    Raises:
        ValueError: if `rewards` has another shape, or a value that is not finite, or if `num_generations` does not fit.

    Example:

    ```python
    >>> import torch
    >>> from flow_trl.credit import control_variate_rewards

    >>> rewards = torch.tensor([[1.0, 1.0], [3.0, 2.0], [0.0, 5.0], [4.0, 9.0]])  # two groups of two, one step
    >>> control_variate_rewards(rewards, num_generations=2)
    tensor([[ 0.],
            [-1.],
            [ 5.],
            [ 7.]])
    ```
    """
    return control_variates(rewards, num_generations, outcome=outcome).step_rewards
