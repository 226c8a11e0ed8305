"""TurningPoint-GRPO: each denoising step gets the credit for what it changed."""

import torch

from ..credit import control_variates, incremental_rewards, turning_point_rewards
from .flow_grpo_trainer import FlowGRPOTrainer
from .tp_grpo_config import TPGRPOConfig


class TPGRPOTrainer(FlowGRPOTrainer):
    """
    Trainer for [TurningPoint-GRPO](https://huggingface.co/papers/2602.06422). The only change against
    [`FlowGRPOTrainer`] is the reward of a step: not the final image's, but what the step changed in the reward of the
    ODE completion, or, at a turning point, its long-term effect.

    Takes the arguments of [`~flow_trl.trainer.diffusion_trainer.DiffusionTrainer`], with a [`TPGRPOConfig`].

    Example:

    ```python
    from peft import LoraConfig
    from flow_trl import TPGRPOConfig, TPGRPOTrainer, tiny

    trainer = TPGRPOTrainer(
        model=tiny.load_flow_pipeline(),
        reward_funcs=tiny.scene_reward(),
        args=TPGRPOConfig("tiny-scenes", pipeline_kwargs={"max_sequence_length": 0}, num_inference_steps=6),
        train_dataset=tiny.load_prompts("scenes", "train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    )
    trainer.train()
    trainer.push_to_hub()
    ```
    """

    _paper = {
        "title": "Alleviating Sparse Rewards by Modeling Step-Wise and Long-Term Sampling Effects in Flow-Based GRPO",
        "id": "2602.06422",
    }
    _card_arguments = FlowGRPOTrainer._card_arguments + ["credit", "completion_stride"]

    _config_class = TPGRPOConfig
    args: TPGRPOConfig

    @property
    def _name(self) -> str:
        return "Control-variate GRPO" if self.args.credit.endswith("control_variate") else "TP-GRPO"

    @property
    def _needs_completions(self) -> bool:
        return self.args.credit != "outcome"

    @property
    def _completion_stride(self) -> int:
        return self.args.completion_steps

    def _step_rewards(self, rewards: torch.Tensor, prefix: str = "") -> torch.Tensor:
        if self.args.credit == "outcome":
            return super()._step_rewards(rewards)
        if self.args.credit.endswith("control_variate"):
            return self._control_variate_rewards(rewards, prefix)
        incremental = incremental_rewards(rewards)
        self._record_steps(f"incremental_reward/{prefix}step", incremental)
        if self.args.credit == "incremental":
            return incremental
        points = turning_point_rewards(rewards, consistent=self.args.credit == "consistent")
        self._record_steps(f"turning_points/{prefix}step", points.aggregated)
        return points.step_rewards

    def _control_variate_rewards(self, rewards: torch.Tensor, prefix: str) -> torch.Tensor:
        outcome = self.args.credit == "outcome_control_variate" or self.args.completion_stride == "jump"
        found = control_variates(rewards, self.args.num_generations, outcome=outcome)
        self._record_steps(f"control_variate/{prefix}beta", found.beta)
        self._record_steps(f"control_variate/{prefix}correlation", found.correlation[None])
        return found.step_rewards

    def _record_steps(self, name: str, values: torch.Tensor) -> None:
        """Means over the rows of values (..., K), for each step."""
        self._record({f"{name}_{k}": value for k, value in enumerate(values.float().mean(0).tolist(), 1)})
