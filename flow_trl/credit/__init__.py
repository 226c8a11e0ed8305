"""Credit assignment: rewards in, advantages out. Pure tensor functions without models, I/O or trainers."""

from .groups import group_advantages
from .turning_points import TurningPoints, incremental_rewards, turning_point_rewards


__all__ = [
    "TurningPoints",
    "group_advantages",
    "incremental_rewards",
    "turning_point_rewards",
]
