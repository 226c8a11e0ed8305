"""Arguments of [`TPGRPOTrainer`]."""

from dataclasses import dataclass, field

from .flow_grpo_config import FlowGRPOConfig


@dataclass
class TPGRPOConfig(FlowGRPOConfig):
    r"""
    Arguments of [`TPGRPOTrainer`]. Defaults are the setting of [TP-GRPO](https://huggingface.co/papers/2602.06422).

    Only the arguments that differ from [`FlowGRPOConfig`] are listed.

    Args:
        credit (`str`, *optional*, defaults to `"consistent"`):
            Reward of a denoising step:

            - `"outcome"`: the finished image's reward for every step (this is Flow-GRPO);
            - `"incremental"`: what the step alone changed, `r_k = R_k - R_{k-1}`;
            - `"turning_point"`: `r_k`, and the aggregated `R_K - R_{k-1}` at every turning point;
            - `"consistent"`: the same, at consistent turning points only (the paper's method).
        completion_stride (`int`, *optional*, defaults to `1`):
            Number of sigmas that the ODE completions step over at a time. 1 is exact; above 1 is cheaper and changes
            some signs of `r_k` (`examples/benchmarks/rollout.py` measures how many).
    """

    credit: str = field(
        default="consistent",
        metadata={
            "help": "Reward of a denoising step.",
            "choices": ["outcome", "incremental", "turning_point", "consistent"],
        },
    )
    completion_stride: int = field(
        default=1, metadata={"help": "Number of sigmas that the ODE completions step over at a time; 1 is exact."}
    )

    def _validate(self) -> None:
        choices = ("outcome", "incremental", "turning_point", "consistent")
        self._check("credit", self.credit in choices, f"choose one of {choices}")
        self._check("completion_stride", self.completion_stride >= 1, "it must be at least 1 (exact)")
        super()._validate()
