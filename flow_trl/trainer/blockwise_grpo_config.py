"""Arguments of [`BlockwiseGRPOTrainer`]."""

import math
from dataclasses import dataclass, field

from trl import GRPOConfig

from ..credit import BASELINES
from .arguments import Arguments, described


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")


@described
@dataclass
class BlockwiseGRPOConfig(Arguments, GRPOConfig):
    r"""
    Arguments of [`BlockwiseGRPOTrainer`]: all those of [`~trl.GRPOConfig`], and how a block's baseline is estimated.

    The setting of [the paper](https://huggingface.co/papers/2602.10231) is `num_generations=32`, a generation of 2048
    completions, `learning_rate=1e-6` with 64 warm-up steps, `beta=0`, `temperature=1`, and adaptive entropy
    (`use_adaptive_entropy=True, entropy_target=0.2, entropy_coef_delta=5e-4`), and `charge_missing=False`.

    Only the arguments that differ from [`~trl.GRPOConfig`] are listed.

    Args:
        baseline (`str`, *optional*, defaults to `"outcome"`):
            What a later block's reward is compared with (the first block's always with its group):

            - `"outcome"`: the mean over those of the group whose prefix had the same outcome (the paper's method).
            - `"group"`: the mean of the prompt's group.
            - `"batch"`: the mean of the generation.
            - `"none"`: 0.
        min_stratum_size (`int`, *optional*, defaults to `1`):
            With fewer completions of the same outcome in the group, the group's mean is taken instead.
        shrinkage (`float`, *optional*, defaults to `0.0`):
            Pulls the mean of n completions with the same outcome towards the group's: its weight is
            n / (n + shrinkage).
        leave_one_out (`bool`, *optional*, defaults to `False`):
            Whether a completion is left out of the means that it is compared with.
        charge_missing (`bool`, *optional*, defaults to `True`):
            Whether a later block that is missing costs its `missing_reward` in the training reward of the block before
            it (of the nearest that is there), so that blocks get written. In the paper's setting it costs nothing.
        loss_type (`str`, *optional*, defaults to `"grpo"`):
            As in [`~trl.GRPOConfig`], of those that can carry an advantage per token: `"grpo"`, `"bnpo"`, `"dr_grpo"`,
            `"dapo"`, `"cispo"`, `"sapo"` and `"vespo"`. Whatever the type's own normalisation, each block of a
            completion weighs the same, so the first four are one and the same policy loss here; they differ in what
            the KL term is divided by.
        scale_rewards (`str` or `bool`, *optional*, defaults to `"none"`):
            What a block's advantage is divided by: `"none"`, `"group"` or `"batch"` (standard deviation of its reward
            in the group or the generation).
        trust_checkpoint (`bool`, *optional*, defaults to `False`):
            Whether a resumed run may read pickles, which can run any code, from its checkpoint. DeepSpeed and sharded FSDP
            need it; everything else is read as tensors.

    Raises:
        ValueError: if an argument is out of range or cannot carry an advantage per block.
    """

    baseline: str = field(default="outcome", metadata={"choices": list(BASELINES)})
    min_stratum_size: int = 1
    shrinkage: float = 0.0
    leave_one_out: bool = False
    charge_missing: bool = True
    loss_type: str = field(default="grpo", metadata={"choices": list(LOSS_TYPES)})
    scale_rewards: str = "none"
    trust_checkpoint: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._check(
            "loss_type",
            self.loss_type != "luspo",
            "LUSPO's ratio is the whole sequence's, so a block's advantage would move the tokens of all blocks. "
            f"Choose one of {', '.join(LOSS_TYPES)}",
        )
        self._check_choices()
        self._check("min_stratum_size", self.min_stratum_size >= 1, "it must be at least 1, which switches it off")
        self._check(
            "min_stratum_size",
            self.min_stratum_size <= self.num_generations - self.leave_one_out,
            f"no stratum of a group of `num_generations={self.num_generations}` is that large"
            + (", the completion itself left out" if self.leave_one_out else ""),
        )
        self._check(
            "shrinkage", 0 <= self.shrinkage < math.inf, "it must be at least 0, which switches it off, and finite"
        )
        self._check("scale_rewards", self.scale_rewards in ("none", "group", "batch"), "choose none, group or batch")
        self._check(
            "importance_sampling_level",
            self.importance_sampling_level == "token",
            "only 'token' can carry an advantage per block: with a ratio of the whole sequence, a block's advantage "
            "would move the tokens of all blocks",
        )
        self._check(
            "multi_objective_aggregation",
            self.multi_objective_aggregation == "sum_then_normalize",
            "only 'sum_then_normalize' is supported: the rewards of a block are summed, and blocks are kept apart",
        )
        self._check("reward_weights", self.reward_weights is None, "give them to each `Block` as `reward_weights`")
