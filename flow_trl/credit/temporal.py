"""Credit over the steps of a diffusion trajectory: rewards by prompt, returns, temporal-difference advantages."""

from collections import deque

import torch


class PerPromptRunningMoments:
    r"""
    Normalises rewards by the mean and standard deviation of the last rewards of the same prompt
    ([DDPO](https://huggingface.co/papers/2305.13301)).

    $$ \hat r = \frac{r - \operatorname{mean}(b)}{\operatorname{std}(b) + \varepsilon} $$

    where b is the prompt's buffer, these rewards included. While it holds fewer than `min_count` rewards, b is the batch
    instead. The standard deviation is that of the population.

    Args:
        buffer_size (`int`, *optional*, defaults to `32`):
            Number of rewards that are kept of each prompt; the oldest go first.
        min_count (`int`, *optional*, defaults to `16`):
            Number of rewards from which on the buffer is used; at most `buffer_size`.
        eps (`float`, *optional*, defaults to `1e-6`):
            Added to the standard deviation.

    Attributes:
        buffers (`dict[str, deque[float]]`):
            The rewards that are kept of each prompt.

    Raises:
        ValueError: if `min_count` is below 1 or above `buffer_size`.

    Example:

    ```python
    >>> import torch
    >>> from flow_trl.credit import PerPromptRunningMoments

    >>> moments = PerPromptRunningMoments(buffer_size=4, min_count=2)
    >>> moments.normalize(["a cat", "a cat", "a dog"], torch.tensor([1.0, 3.0, 2.0]))
    tensor([-1.0000,  1.0000,  0.0000])
    ```
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16, eps: float = 1e-6):
        if not 1 <= min_count <= buffer_size:
            raise ValueError(
                f"`min_count={min_count}` does not work with `buffer_size={buffer_size}`: a buffer never holds more than "
                "its size, so use 1 <= min_count <= buffer_size."
            )
        self.buffer_size, self.min_count, self.eps = buffer_size, min_count, eps
        self.buffers: dict[str, deque[float]] = {}

    def normalize(self, prompts: list[str], rewards: torch.Tensor) -> torch.Tensor:
        """
        Adds rewards to the buffers of their prompts and returns them normalised.

        Args:
            prompts (`list[str]`):
                N prompts, in any order.
            rewards (`torch.Tensor` of shape `(N,)`):
                Their rewards, of all processes. Any finite values.

        Returns:
            `torch.Tensor` of shape `(N,)`: float32, on the device of `rewards`.

        Raises:
            ValueError: if the numbers of prompts and rewards differ, or a reward is not finite.
        """
        if rewards.shape != (len(prompts),):
            raise ValueError(
                f"`rewards` has shape {tuple(rewards.shape)} for {len(prompts)} prompts: pass one reward for each."
            )
        if not rewards.isfinite().all():
            index = (~rewards.isfinite()).nonzero()[0].item()
            raise ValueError(
                f"`rewards[{index}]` is {rewards[index].item()} (prompt {prompts[index]!r}): all rewards must be finite."
            )
        values = rewards.double().cpu()
        for prompt, value in zip(prompts, values.tolist(), strict=True):
            self.buffers.setdefault(prompt, deque(maxlen=self.buffer_size)).append(value)
        batch = (values.mean(), values.std(correction=0))
        moments = {}
        for prompt in dict.fromkeys(prompts):
            buffer = torch.tensor(self.buffers[prompt], dtype=torch.float64)
            enough = len(buffer) >= self.min_count
            moments[prompt] = (buffer.mean(), buffer.std(correction=0)) if enough else batch
        mean, std = (torch.stack([moments[prompt][i] for prompt in prompts]) for i in (0, 1))
        return ((values - mean) / (std + self.eps)).float().to(rewards.device)


def temporal_advantages(
    rewards: torch.Tensor, values: torch.Tensor, *, gamma: float = 1.0, step_penalties: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Advantages of denoising steps against a critic of their latents
    ([TDPO](https://huggingface.co/papers/2402.08552)).

    The return of step t and its advantage, whitened over all N trajectories and T steps, are

    $$ G_t = \sum_{u=t}^{T} \gamma^{u-t} r_u, \qquad
    A_t = \frac{\delta_t - \operatorname{mean}(\delta)}{\operatorname{std}(\delta) + 10^{-8}}, \qquad
    \delta_t = G_t - V(x_t) $$

    where the last step earns the final reward and every step pays its penalty, if there is one.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            Final reward of each trajectory, normalised.
        values (`torch.Tensor` of shape `(N, T)`):
            What the critic makes of the latents before each step. Zeros: no critic.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount of a step, in [0, 1].
        step_penalties (`torch.Tensor` of shape `(N, T)`, *optional*):
            What is taken off the reward of each step, such as a KL penalty.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: advantages and returns, both `(N, T)` and float32.

    Raises:
        ValueError: if shapes do not fit, or `gamma` is out of its range.

    Example:

    ```python
    >>> import torch
    >>> from flow_trl.credit import temporal_advantages

    >>> advantages, returns = temporal_advantages(torch.tensor([1.0, -1.0]), torch.zeros(2, 3), gamma=0.5)
    >>> returns
    tensor([[ 0.2500,  0.5000,  1.0000],
            [-0.2500, -0.5000, -1.0000]])
    ```
    """
    if rewards.ndim != 1 or values.ndim != 2 or len(values) != len(rewards):
        raise ValueError(
            f"`rewards` has shape {tuple(rewards.shape)} and `values` {tuple(values.shape)}: pass (N,) and (N, T)."
        )
    if step_penalties is not None and step_penalties.shape != values.shape:
        raise ValueError(
            f"`step_penalties` has shape {tuple(step_penalties.shape)}, `values` has {tuple(values.shape)}: they must "
            "be equal."
        )
    if not 0 <= gamma <= 1:
        raise ValueError(f"`gamma` is {gamma}: it must be in [0, 1]; 1 does not discount.")
    earned = torch.zeros_like(values, dtype=torch.float32)
    if step_penalties is not None:
        earned -= step_penalties
    earned[:, -1] += rewards
    returns = earned.clone()
    for t in range(values.shape[1] - 2, -1, -1):
        returns[:, t] += gamma * returns[:, t + 1]
    delta = returns - values
    return (delta - delta.mean()) / (delta.std(correction=0) + 1e-8), returns
