"""Credit assignment: rewards in, advantages out. Pure tensor functions without models, I/O or trainers."""

from .blocks import BASELINES, block_advantages, token_advantages
from .groups import group_advantages
from .temporal import PerPromptRunningMoments, temporal_advantages
from .turning_points import TurningPoints, incremental_rewards, turning_point_rewards


__all__ = [
    "BASELINES",
    "PerPromptRunningMoments",
    "TurningPoints",
    "block_advantages",
    "group_advantages",
    "incremental_rewards",
    "temporal_advantages",
    "token_advantages",
    "turning_point_rewards",
]
