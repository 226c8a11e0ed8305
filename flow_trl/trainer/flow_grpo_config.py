"""Arguments of [`FlowGRPOTrainer`]."""

import math
from dataclasses import dataclass, field

from ..credit import SCALES
from .arguments import described
from .diffusion_config import DiffusionConfig


@described
@dataclass
class FlowGRPOConfig(DiffusionConfig):
    r"""
    Arguments of [`FlowGRPOTrainer`]. Defaults are the setting of [Flow-GRPO](https://huggingface.co/papers/2505.05470)
    and [TP-GRPO](https://huggingface.co/papers/2602.06422) for Stable Diffusion 3.5 Medium, where they do not depend on
    the hardware.

    Only the arguments that differ from [`DiffusionConfig`] are listed.

    Args:
        guidance_scale (`float`, *optional*, defaults to `4.5`):
            Strength of guidance, in sampling and in training. If `None`, the pipeline's default.
        beta (`float`, *optional*, defaults to `4e-4`):
            Weight of the KL divergence to the reference. `0` switches it off.
        noise_level (`float`, *optional*, defaults to `0.7`):
            Noise level a of the stochastic steps: above 0 for `"sde"`, in (0, 1] for `"cps"` (0.8 is usual there).
        sde_type (`str`, *optional*, defaults to `"sde"`):
            Kind of stochastic step: `"sde"` (Flow-GRPO) or `"cps"`
            ([coefficient-preserving sampling](https://huggingface.co/papers/2509.05952)).
        sde_window_size (`int`, *optional*):
            Number of consecutive stochastic steps. The others are ODE steps and are not trained. If not set, all steps
            but the last are stochastic.
        sde_window_range (`list[int]`, *optional*):
            The window lies in the steps `[first, last)`, at a place drawn for each generation. If not set,
            `[0, num_inference_steps - 1]`.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            What advantages are divided by: `"group"` (standard deviation in the prompt's group, of each step),
            `"trajectory"` (one standard deviation for all steps of the group, so that steps weigh what they earned),
            `"batch"` (in the generation) or `"none"`.
        step_weights (`str`, *optional*, defaults to `"none"`):
            Weights of the steps in the loss: `"none"`, or `"noise"`, the standard deviation of the noise that a step
            injects, divided by its mean over the steps ([TempFlow-GRPO](https://huggingface.co/papers/2508.04324)). The
            gradient of a log-probability grows as the noise shrinks; this makes up for it.
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            How several rewards become one advantage: `"sum_then_normalize"`, or `"normalize_then_sum"`, as in TRL
            ([GDPO](https://huggingface.co/papers/2601.05242)): each is normalised by `scale_rewards`, then they are summed
            with their weights and divided by the standard deviation over the generation. An image to which a reward does
            not apply then counts as an average one.
    """

    guidance_scale: float | None = 4.5
    beta: float = 4e-4
    noise_level: float = 0.7
    sde_type: str = field(default="sde", metadata={"choices": ["sde", "cps"]})
    sde_window_size: int | None = None
    sde_window_range: list[int] | None = None
    scale_rewards: str = field(default="group", metadata={"choices": list(SCALES)})
    step_weights: str = field(default="none", metadata={"choices": ["none", "noise"]})
    multi_objective_aggregation: str = field(
        default="sum_then_normalize", metadata={"choices": ["sum_then_normalize", "normalize_then_sum"]}
    )

    @property
    def num_trained_steps(self) -> int:
        return self.num_inference_steps - 1 if self.sde_window_size is None else self.sde_window_size

    def _validate(self) -> None:
        last = self.num_inference_steps - 1
        self._check(
            "num_generations",
            self.num_generations >= 2,
            "advantages compare the images of one prompt, so there must be at least 2 (24 in the paper). With 1 every "
            "advantage is 0 or noise, and images degrade",
        )
        self._check(
            "noise_level",
            0 < self.noise_level < math.inf and (self.sde_type == "sde" or self.noise_level <= 1),
            "it must be above 0, and at most 1 for `sde_type='cps'`; usual are 0.7 (sde) and 0.8 (cps)",
        )
        self._check(
            "multi_objective_aggregation",
            self.multi_objective_aggregation == "sum_then_normalize" or self.scale_rewards != "none",
            "it normalises each reward by `scale_rewards`, which is 'none': choose 'group', 'trajectory' or 'batch'",
        )
        bounds = self.sde_window_range
        if bounds is not None:
            self._check(
                "sde_window_range",
                len(bounds) == 2 and 0 <= bounds[0] < bounds[1] <= last,
                f"it must be [first, last] with 0 <= first < last <= {last} = `num_inference_steps` - 1 (the last step "
                "is never stochastic)",
            )
            self._check(
                "sde_window_range", self.sde_window_size is not None, "it has a meaning only with `sde_window_size`"
            )
        if self.sde_window_size is not None:
            first, last = bounds or (0, last)
            self._check(
                "sde_window_size",
                1 <= self.sde_window_size <= last - first,
                f"the steps [{first}, {last}) have room for 1 to {last - first} stochastic steps",
            )
        super()._validate()
