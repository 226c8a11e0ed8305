"""Group-relative advantages: a reward counts by how it compares with the others of its prompt."""

import torch


SCALES = ("group", "trajectory", "batch", "none")


def group_advantages(
    values: torch.Tensor, num_generations: int, *, scale_rewards: str | bool = "group", eps: float = 1e-4
) -> torch.Tensor:
    r"""
    Normalises rewards within each prompt's group, for each denoising step separately.

    $$ A = \frac{y - \operatorname{mean}_\text{group}(y)}{\operatorname{std}(y) + \varepsilon} $$

    with the population standard deviation ([GRPO](https://huggingface.co/papers/2402.03300), for the steps of a flow
    model as in [TP-GRPO](https://huggingface.co/papers/2602.06422)). A group whose values are all equal gets
    advantages of exactly 0, so it can be told by `advantages == 0`.

    Args:
        values (`torch.Tensor` of shape `(N,)` or `(N, K)`):
            Rewards of `N` samples, or of their `K` steps. Each `num_generations` consecutive rows are one prompt's
            group. NaN is not left out: it spreads to what it is compared with.
        num_generations (`int`):
            Size of a group, at least 2; divides `N`.
        scale_rewards (`str` or `bool`, *optional*, defaults to `"group"`):
            What the standard deviation is taken over:

            - `True` or `"group"`: the sample's group.
            - `"trajectory"`: all `K` steps of the sample's group, each step about its own mean
              ([Stepwise-Flow-GRPO](https://huggingface.co/papers/2603.28718)), so that steps keep the weight of what they
              earned. For `(N,)` the same as `"group"`.
            - `"batch"`: all `N` samples. The mean remains the group's.
            - `False` or `"none"`: no division.
        eps (`float`, *optional*, defaults to `1e-4`):
            Added to the standard deviation.

    Returns:
        `torch.Tensor` of the shape of `values`: the advantages, float64 if `values` is, else float32.

    Raises:
        ValueError: if `values` has not one or two dimensions, if `num_generations` is below 2 or does not divide `N`,
            or if `scale_rewards` is unknown.

    Example:

    ```python
    >>> import torch
    >>> from flow_trl.credit import group_advantages

    >>> group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), num_generations=2)
    tensor([-0.9999,  0.9999,  0.0000,  0.0000])
    ```
    """
    scale_rewards = {True: "group", False: "none"}.get(scale_rewards, scale_rewards)
    if scale_rewards not in SCALES:
        raise ValueError(f"`scale_rewards` is {scale_rewards!r}: use one of {SCALES}.")
    if values.ndim not in (1, 2):
        raise ValueError(f"`values` has shape {tuple(values.shape)}: it must be (N,) or (N, K).")
    if num_generations < 2:
        raise ValueError(
            f"`num_generations` is {num_generations}: use at least 2. A sample is compared with the others "
            "of its group."
        )
    if len(values) % num_generations:
        raise ValueError(
            f"`num_generations` is {num_generations}, which does not divide the {len(values)} rows of `values`: pass "
            "whole groups."
        )
    y = values if values.dtype == torch.float64 else values.float()
    y = y.unflatten(0, (len(y) // num_generations, num_generations))  # (groups, num_generations[, K])
    # Measured from the first, equal values have a mean of exactly 0. (The mean of 24 times 0.1 is not 0.1.)
    y = y - y[:, :1]
    advantages = y - y.mean(1, keepdim=True)
    if scale_rewards == "group":
        advantages = advantages / (y.std(1, correction=0, keepdim=True) + eps)
    elif scale_rewards == "trajectory":
        within = tuple(range(1, y.ndim))
        advantages = advantages / (advantages.square().mean(within, keepdim=True).sqrt() + eps)
    elif scale_rewards == "batch":
        advantages = advantages / (values.to(y.dtype).std(0, correction=0) + eps)
    return advantages.flatten(0, 1)


def fill_with_group_mean(values: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Puts the mean of its group in the place of each missing value, so that it neither earns nor costs anything.

    Args:
        values (`torch.Tensor` of shape `(N,)` or `(N, K)`):
            Rewards, NaN where there is none. Each `num_generations` consecutive rows are one prompt's group.
        num_generations (`int`):
            Size of a group; divides `N`.

    Returns:
        `torch.Tensor` of the shape of `values`: without NaN; 0 where a whole group is missing.

    Example:

    ```python
    >>> import torch
    >>> from flow_trl.credit import fill_with_group_mean

    >>> fill_with_group_mean(torch.tensor([1.0, 3.0, torch.nan, torch.nan, torch.nan, torch.nan]), num_generations=3)
    tensor([1., 3., 2., 0., 0., 0.])
    ```
    """
    groups = values.unflatten(0, (-1, num_generations))
    smallest = groups.nan_to_num(torch.inf).amin(1, keepdim=True)  # measured from it, equal values are filled exactly
    means = (smallest + (groups - smallest).nanmean(1, keepdim=True)).nan_to_num(0.0)
    return torch.where(groups.isnan(), means, groups).flatten(0, 1)
