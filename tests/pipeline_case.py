"""What a test needs to know of a small random pipeline."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Case:
    """
    Args:
        build (`Callable`): makes the pipeline, always the same.
        kwargs (`dict`): arguments of its call.
        guidance (`tuple`): `guidance_scale` with and without guidance; `None` where the class has no such argument.
        columns (`dict[str, list]`): for each of two prompts, what else the call is given.
    """

    build: Callable[..., DiffusionPipeline]
    kwargs: dict[str, Any]
    guidance: tuple[float | None, float | None] = (4.0, 1.0)
    columns: dict[str, list] = field(default_factory=dict)
