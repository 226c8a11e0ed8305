"""Credit assignment: rewards in, advantages out. Pure tensor functions without models, I/O or trainers."""

from .blocks import BASELINES, block_advantages, charge_missing_blocks, token_advantages
from .control_variates import ControlVariates, control_variate_rewards, control_variates
from .groups import SCALES, fill_with_group_mean, group_advantages
from .temporal import PerPromptRunningMoments, temporal_advantages
from .turning_points import TurningPoints, incremental_rewards, turning_point_rewards


__all__ = [
    "BASELINES",
    "ControlVariates",
    "PerPromptRunningMoments",
    "SCALES",
    "TurningPoints",
    "block_advantages",
    "charge_missing_blocks",
    "control_variate_rewards",
    "control_variates",
    "fill_with_group_mean",
    "group_advantages",
    "incremental_rewards",
    "temporal_advantages",
    "token_advantages",
    "turning_point_rewards",
]
