"""Arguments of [`TPGRPOTrainer`]."""

from dataclasses import dataclass, field

from .arguments import described
from .flow_grpo_config import FlowGRPOConfig


CREDITS = [
    "outcome", "incremental", "turning_point", "consistent", "control_variate", "outcome_control_variate"
]  # fmt: skip


@described
@dataclass
class TPGRPOConfig(FlowGRPOConfig):
    r"""
    Arguments of [`TPGRPOTrainer`]. Defaults are the setting of [TP-GRPO](https://huggingface.co/papers/2602.06422).

    Only the arguments that differ from [`FlowGRPOConfig`] are listed. `TPGRPOConfig("out", **TPGRPOConfig.RECOMMENDED)` is
    the credit that was best for its cost in this library's own measurements.

    Args:
        credit (`str`, *optional*, defaults to `"consistent"`):
            Reward of a denoising step:

            - `"outcome"`: the finished image's reward for every step (this is Flow-GRPO);
            - `"incremental"`: what the step alone changed, `r_k = R_k - R_{k-1}`;
            - `"turning_point"`: `r_k`, and the aggregated `R_K - R_{k-1}` at every turning point;
            - `"consistent"`: the same, at consistent turning points only (the paper's method);
            - `"control_variate"`: `R_k - beta_k R_{k-1}` with the coefficient of least variance
              ([`~flow_trl.credit.control_variate_rewards`]); with `completion_stride="jump"` the next one;
            - `"outcome_control_variate"`: `R_K - beta_k R_{k-1}`, unbiased whatever the completions.
        completion_stride (`int` or `str`, *optional*, defaults to `1`):
            Number of sigmas that the ODE completions step over at a time. 1 is exact; above 1 is cheaper and changes
            some signs of `r_k` (`examples/benchmarks/rollout.py` measures how many). `"jump"` steps straight to 0 with the
            velocity that the trajectory has computed anyway: it costs no evaluation, only decoding and a reward, and is
            for the control variates alone.
    """

    RECOMMENDED = {
        "credit": "control_variate",
        "completion_stride": 2,
        "scale_rewards": "trajectory",
        "step_weights": "noise",
    }

    credit: str = field(default="consistent", metadata={"choices": CREDITS})
    completion_stride: int | str | None = 1  # `None` is refused; with it the parser takes any text

    @property
    def completion_steps(self) -> int:
        """`completion_stride` as a number of steps."""
        return self.num_inference_steps if self.completion_stride == "jump" else self.completion_stride

    def _validate(self) -> None:
        if isinstance(self.completion_stride, str) and self.completion_stride.isdecimal():  # from a command line
            self.completion_stride = int(self.completion_stride)
        is_jump = self.completion_stride == "jump"
        self._check(
            "completion_stride",
            is_jump or (isinstance(self.completion_stride, int) and self.completion_stride >= 1),
            "it must be at least 1 (exact), or 'jump'",
        )
        self._check(
            "completion_stride",
            not is_jump or self.credit in ("outcome", "control_variate", "outcome_control_variate"),
            f"`credit={self.credit!r}` compares completions with each other, for which they are too coarse: choose "
            "`credit='control_variate'`, or a number",
        )
        super()._validate()
