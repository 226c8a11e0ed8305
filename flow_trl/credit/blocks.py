"""Block advantages: each block of a completion is compared with blocks that began like it."""

from collections.abc import Hashable, Sequence

import torch


BASELINES = ("outcome", "group", "batch", "none")


def block_advantages(
    rewards: torch.Tensor,
    outcomes: Sequence[Sequence[Hashable] | None],
    num_generations: int,
    *,
    baseline: str = "outcome",
    min_stratum_size: int = 1,
    shrinkage: float = 0.0,
    leave_one_out: bool = False,
    scale_rewards: str | bool = "none",
    eps: float = 1e-4,
) -> torch.Tensor:
    r"""
    Advantages of the blocks of completions, each block against a baseline of its own
    ([Blockwise Advantage Estimation](https://huggingface.co/papers/2602.10231)).

    $$ A_k = r_k - b_k, \qquad b_k \approx \mathbb{E}[r_k \mid \text{prompt}, \text{prefix}_k] $$

    The first block's baseline is the mean of its prompt's group. Later blocks start from prefixes that differ within
    the group; with `baseline="outcome"` they are compared with those of the group whose prefix had the same outcome
    \\( o \\), a stratum of \\( n \\) completions:

    $$ b_k = \lambda \operatorname{mean}_{\text{group}, o}(r_k) + (1 - \lambda) \operatorname{mean}_\text{group}(r_k),
    \qquad \lambda = \frac{n}{n + \text{shrinkage}} $$

    Args:
        rewards (`torch.Tensor` of shape `(N, n_blocks)`):
            Reward of each block of each completion. NaN marks a block that is missing or has no reward: it counts in
            no mean and gets an advantage of 0. Each `num_generations` consecutive rows are one prompt's group.
        outcomes (`Sequence`):
            For each block, `None` or `N` hashable values: the outcome of what stands before the block. The first
            block has `None` and is compared with its group, whatever the `baseline`. For `baseline="outcome"` every
            later block needs values.
        num_generations (`int`):
            Size of a group; divides `N`.
        baseline (`str`, *optional*, defaults to `"outcome"`):
            Baseline of the later blocks: `"outcome"`, `"group"` (mean of the prompt's group), `"batch"` (mean of all
            `N`) or `"none"` (0).
        min_stratum_size (`int`, *optional*, defaults to `1`):
            A stratum with fewer completions takes the group's mean instead of its own.
        shrinkage (`float`, *optional*, defaults to `0.0`):
            Strength of the pull of a stratum's mean towards the group's, in completions.
        leave_one_out (`bool`, *optional*, defaults to `False`):
            Whether a completion is left out of its own means. Then \\( n \\) counts the others; a completion alone in
            its stratum takes the group's mean, and one without any other to compare with an advantage of 0.
        scale_rewards (`str` or `bool`, *optional*, defaults to `"none"`):
            What advantages are divided by: `"none"`, `"group"` (standard deviation of the block's reward in the
            group) or `"batch"` (in all `N`), as in [`~trl.GRPOConfig`], with the unbiased standard deviation.
        eps (`float`, *optional*, defaults to `1e-4`):
            Added to the standard deviation.

    Returns:
        `torch.Tensor` of shape `(N, n_blocks)`: advantages in the dtype of `rewards`, 0 where `rewards` is NaN.

    Raises:
        ValueError: if shapes do not go together, an option is out of range, or outcomes are missing.
        TypeError: if an outcome is not hashable.

    Example:

    ```python
    >>> import torch
    >>> from flow_trl.credit import block_advantages

    >>> correct = [1, 1, 0, 0, 1, 0]
    >>> confidence = torch.tensor([-0.04, -0.25, -0.81, -0.09, -0.01, -0.36])
    >>> rewards = torch.stack([torch.tensor(correct).float(), confidence], dim=1)
    >>> block_advantages(rewards, [None, correct], num_generations=6)[:, 1]
    tensor([ 0.0600, -0.1500, -0.3900,  0.3300,  0.0900,  0.0600])
    ```
    """
    scale_rewards = {True: "group", False: "none"}.get(scale_rewards, scale_rewards)
    _check(rewards, outcomes, num_generations, baseline, min_stratum_size, shrinkage, scale_rewards)
    columns = []
    # Contiguous, because the order of a sum changes its last bits.
    for k, (reward, outcome) in enumerate(zip(rewards.T.contiguous(), outcomes, strict=True)):
        group = reward.view(-1, num_generations)
        kind = "group" if k == 0 and outcome is None else baseline
        if kind == "none":
            mean = torch.zeros_like(reward)
        elif kind == "batch":
            mean = _means(reward[None], leave_one_out)
        else:
            mean = _means(group, leave_one_out)
        if kind == "outcome":
            stratum_mean, size = _stratum_means(reward, outcome, num_generations, leave_one_out, k)
            share = size / (size + shrinkage)
            mean = torch.where(
                size >= min_stratum_size,
                share * stratum_mean + (1 - share) * mean if shrinkage else stratum_mean,
                mean,
            )
        advantage = reward - mean
        if scale_rewards != "none":
            of = group if scale_rewards == "group" else reward[None]
            advantage = advantage / (_std(of) + eps)
        columns.append(advantage.nan_to_num(nan=0.0))
    return torch.stack(columns, dim=1)


def _check(rewards, outcomes, num_generations, baseline, min_stratum_size, shrinkage, scale_rewards) -> None:
    if rewards.ndim != 2 or not rewards.is_floating_point():
        raise ValueError(
            f"`rewards` has shape {tuple(rewards.shape)} and dtype {rewards.dtype}: pass floats of shape "
            "(N, n_blocks)."
        )
    if num_generations < 1 or len(rewards) % num_generations:
        raise ValueError(
            f"`num_generations` is {num_generations}, which does not divide the {len(rewards)} rows of `rewards`: "
            "pass whole groups."
        )
    if baseline not in BASELINES:
        raise ValueError(f"`baseline` is {baseline!r}: choose one of {', '.join(map(repr, BASELINES))}.")
    if min_stratum_size < 1:
        raise ValueError(f"`min_stratum_size` is {min_stratum_size}: use at least 1.")
    if not 0 <= shrinkage < float("inf"):
        raise ValueError(f"`shrinkage` is {shrinkage}: use a finite number of at least 0.")
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f'`scale_rewards` is {scale_rewards!r}: use "group", "batch" or "none".')
    if len(outcomes) != rewards.shape[1]:
        raise ValueError(f"`outcomes` has {len(outcomes)} entries for {rewards.shape[1]} blocks: pass one each.")
    for k, outcome in enumerate(outcomes):
        if outcome is None and k and baseline == "outcome":
            raise ValueError(
                f'`outcomes[{k}]` is None: `baseline="outcome"` needs the outcomes of what stands before every later '
                'block. Pass them, or use `baseline="group"`.'
            )
        if outcome is not None and len(outcome) != len(rewards):
            raise ValueError(f"`outcomes[{k}]` has {len(outcome)} values for {len(rewards)} completions.")


def _means(values: torch.Tensor, leave_one_out: bool) -> torch.Tensor:
    """For each value the mean of its row, leaving out NaN: `(values.numel(),)`."""
    if leave_one_out:
        return _others(values.nansum(1, keepdim=True), (~values.isnan()).sum(1, keepdim=True), values)[0]
    # Just what TRL computes, so that a single block gets the same bits.
    return torch.nanmean(values, dim=1).repeat_interleave(values.shape[1])


def _others(total: torch.Tensor, count: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and number of the other values. NaN, so an advantage of 0, where there is no other."""
    present = ~values.isnan()
    size = count - present.to(count.dtype)
    return ((total - values.nan_to_num(nan=0.0)) / size.where(size > 0, torch.nan)).reshape(-1), size.reshape(-1)


def _stratum_means(reward, outcome, num_generations, leave_one_out, k) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and size of each completion's stratum, both `(N,)`."""
    numbers: dict[tuple[int, Hashable], int] = {}
    if any(isinstance(o, torch.Tensor) for o in outcome):
        raise TypeError(
            f"`outcomes[{k}]` holds tensors, of which each is an outcome of its own, whatever its value. "
            "Use `.tolist()`."
        )
    try:
        strata = [numbers.setdefault((i // num_generations, o), len(numbers)) for i, o in enumerate(outcome)]
    except TypeError as error:
        raise TypeError(
            f"`outcomes[{k}]` holds a value that is not hashable ({error}). Use a bool, a number, a string or a tuple."
        ) from error
    index = torch.tensor(strata, dtype=torch.long, device=reward.device)
    present = ~reward.isnan()
    total = reward.new_zeros(len(numbers)).index_add(0, index, reward.nan_to_num(nan=0.0))[index]
    count = reward.new_zeros(len(numbers)).index_add(0, index, present.to(reward.dtype))[index]
    if leave_one_out:
        return _others(total, count, reward)
    return total / count, count


def _std(values: torch.Tensor) -> torch.Tensor:
    """Unbiased standard deviation of each row, leaving out NaN, for each value: `(values.numel(),)`."""
    count = (~values.isnan()).sum(1, keepdim=True).to(values.dtype)
    squares = (values - values.nanmean(1, keepdim=True)).square()
    return (squares.nanmean(1, keepdim=True) * (count / (count - 1))).sqrt().expand(values.shape).reshape(-1)


def charge_missing_blocks(rewards: torch.Tensor, present: torch.Tensor, missing_rewards: torch.Tensor) -> torch.Tensor:
    """
    Charges what a missing block costs to the nearest block before it that is there, which could have gone on to it.

    Args:
        rewards (`torch.Tensor` of shape `(N, n_blocks)`):
            Reward of each block; NaN where it is missing or has none.
        present (`torch.Tensor` of shape `(N, n_blocks)`, bool):
            Which blocks are there. The first one always is.
        missing_rewards (`torch.Tensor` of shape `(n_blocks,)`):
            What each block counts where it is missing; the first one's does not matter.

    Returns:
        `torch.Tensor` of shape `(N, n_blocks)`: rewards to train on. Completions that have all blocks keep theirs.

    Example:

    ```python
    >>> import torch
    >>> from flow_trl.credit import charge_missing_blocks

    >>> rewards, present = torch.tensor([[1.0, -0.1], [1.0, torch.nan]]), torch.tensor([[True, True], [True, False]])
    >>> charge_missing_blocks(rewards, present, torch.tensor([0.0, -1.0]))
    tensor([[ 1.0000, -0.1000],
            [ 0.0000,     nan]])
    ```
    """
    charged = rewards.clone()
    numbers = torch.arange(rewards.shape[1], device=rewards.device)
    for k in range(1, rewards.shape[1]):
        rows = (~present[:, k]).nonzero()[:, 0]
        before = (present[rows, :k] * numbers[:k]).amax(dim=1)
        charged[rows, before] += missing_rewards[k]
    return charged


def token_advantages(
    advantages: torch.Tensor, block_index: torch.Tensor, mask: torch.Tensor, scale: torch.Tensor | float = 1.0
) -> torch.Tensor:
    r"""
    Spreads block advantages over tokens, so that every block weighs the same however long it is.

    A token of block \\( k \\) gets \\( A_k \cdot \text{scale} / |T_k| \\), where \\( T_k \\) are the tokens of the
    block within the mask.

    Args:
        advantages (`torch.Tensor` of shape `(B, n_blocks)`):
            Advantage of each block, its weight included.
        block_index (`torch.Tensor` of shape `(B, T)`, int64):
            Number of each token's block.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 for tokens that are trained, 0 for padding, tool results and so on.
        scale (`torch.Tensor` that broadcasts to `(B, 1)` or `float`, *optional*, defaults to `1.0`):
            What the loss later divides a completion's sum by.

    Returns:
        `torch.Tensor` of shape `(B, T)`: the advantage of each token.

    Example:

    ```python
    >>> import torch
    >>> from flow_trl.credit import token_advantages

    >>> token_advantages(torch.tensor([[1.0, 4.0]]), torch.tensor([[0, 0, 0, 1]]), torch.ones(1, 4), scale=4.0)
    tensor([[ 1.3333,  1.3333,  1.3333, 16.0000]])
    ```
    """
    lengths = torch.zeros_like(advantages).scatter_add(1, block_index, mask.to(advantages.dtype))
    return (advantages * (scale / lengths.clamp(min=1.0))).gather(1, block_index)
