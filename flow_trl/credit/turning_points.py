"""Rewards of single denoising steps, and the turning points of a trajectory (TP-GRPO)."""

from typing import NamedTuple

import torch


class TurningPoints(NamedTuple):
    """
    Rewards of the steps of `N` trajectories.

    Attributes:
        step_rewards (`torch.Tensor` of shape `(N, K)`):
            Each step's reward: aggregated at the turning points that were kept, incremental elsewhere.
        aggregated (`torch.Tensor` of shape `(N, K)`, bool):
            Where the reward is the aggregated one.
    """

    step_rewards: torch.Tensor
    aggregated: torch.Tensor


def check_completion_rewards(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards (N, K + 1) of completions, float32 or float64; raises a `ValueError` if they are not that."""
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"`rewards` has shape {tuple(rewards.shape)}: it must be (N, K + 1) with K >= 1, R_0, ..., R_K for each "
            "of the N trajectories."
        )
    if not rewards.isfinite().all():
        i, k = (~rewards.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"`rewards[{i}, {k}]` is {rewards[i, k].item()}: all rewards must be finite. Leave out the trajectories "
            "to which no reward applies."
        )
    return rewards if rewards.dtype == torch.float64 else rewards.float()


def incremental_rewards(rewards: torch.Tensor) -> torch.Tensor:
    r"""
    What each stochastic step added to the reward: `r_k = R_k - R_{k-1}`, for `k = 1, ..., K`
    ([TP-GRPO](https://huggingface.co/papers/2602.06422)).

    Args:
        rewards (`torch.Tensor` of shape `(N, K + 1)`):
            `R_k` is the reward of the image that results when the first `k` stochastic steps were taken and all others
            were ODE steps. Any finite values.

    Returns:
        `torch.Tensor` of shape `(N, K)`: the incremental rewards, float64 if `rewards` is, else float32.

    Raises:
        ValueError: if `rewards` has another shape, or a value that is not finite.

    Example:

    ```python
    >>> import torch
    >>> from flow_trl.credit import incremental_rewards

    >>> incremental_rewards(torch.tensor([[0.0, 2.0, 1.0, 4.0]]))
    tensor([[ 2., -1.,  3.]])
    ```
    """
    R = check_completion_rewards(rewards)
    return R[:, 1:] - R[:, :-1]


def turning_point_rewards(rewards: torch.Tensor, *, consistent: bool = True, balance: bool = True) -> TurningPoints:
    r"""
    Rewards of denoising steps in which a turning point is credited with all that came of it
    ([TP-GRPO](https://huggingface.co/papers/2602.06422)).

    With the incremental rewards `r_k = R_k - R_{k-1}` and the overall change `D = R_K - R_0`, step `k` is a turning
    point if the step before it went against the overall change and it goes with it:

    $$ \operatorname{sign}(r_{k-1}) \operatorname{sign}(D) < 0 < \operatorname{sign}(r_k) \operatorname{sign}(D) $$

    The first step has none before it, and needs the right-hand part alone. A turning point is consistent if what
    follows it goes on in its direction, `sign(r_k) sign(R_K - R_k) > 0`; then its aggregated reward is larger than
    `r_k`, and of the same sign. A step that counts is rewarded with the aggregated `R_K - R_{k-1}`, every other one
    with `r_k`.

    Balancing keeps equally many counted steps of trajectories that got better (`D > 0`) and that got worse (`D < 0`):
    of each kind those with the largest `|D|`; among equals the earlier trajectory goes first, then the earlier step.
    If one kind does not occur, all are kept. Pass the whole generation, all processes' trajectories, for a result that
    does not depend on how they were distributed.

    Args:
        rewards (`torch.Tensor` of shape `(N, K + 1)`):
            `R_0, ..., R_K` of each trajectory: `R_0` of the image of ODE steps alone, `R_K` of the sampled image, as
            in [`incremental_rewards`]. Any finite values.
        consistent (`bool`, *optional*, defaults to `True`):
            Whether a step must be consistent to count, the paper's method. `False` is its unconstrained variant.
        balance (`bool`, *optional*, defaults to `True`):
            Whether to balance.

    Returns:
        [`TurningPoints`]: the `step_rewards`, float64 if `rewards` is, else float32, and where they are `aggregated`.

    Raises:
        ValueError: if `rewards` has another shape, or a value that is not finite.

    Example:

    ```python
    >>> import torch
    >>> from flow_trl.credit import turning_point_rewards

    >>> turning_point_rewards(torch.tensor([[2.0, 1.0, 3.0, 6.0]]))  # down, then up, and up again
    TurningPoints(step_rewards=tensor([[-1.,  5.,  3.]]), aggregated=tensor([[False,  True, False]]))
    ```
    """
    r = incremental_rewards(rewards)
    R = rewards.to(r.dtype)
    D = R[:, -1:] - R[:, :1]
    g = r.sign() * D.sign()

    counted = g > 0
    counted[:, 1:] &= g[:, :-1] < 0
    if consistent:
        counted &= r.sign() * (R[:, -1:] - R[:, 1:]).sign() > 0
    if balance:
        up, down = counted & (D > 0), counted & (D < 0)
        num_kept = min(up.sum().item(), down.sum().item())
        if num_kept > 0:
            counted = _keep_largest(up, D.abs(), num_kept) | _keep_largest(down, D.abs(), num_kept)
    return TurningPoints(torch.where(counted, R[:, -1:] - R[:, :-1], r), counted)


def _keep_largest(mask: torch.Tensor, size: torch.Tensor, count: int) -> torch.Tensor:
    # A stable sort leaves equals in row-major order: the earlier trajectory, then the earlier step.
    order = torch.where(mask, size, -1.0).flatten().sort(descending=True, stable=True).indices
    kept = torch.zeros_like(mask).flatten()
    kept[order[:count]] = True
    return kept.view_as(mask)
