"""TurningPoint-GRPO: each denoising step gets the credit for what it changed."""

import torch

from ..credit import incremental_rewards, turning_point_rewards
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

    _name = "TP-GRPO"
    _paper = {
        "title": "Alleviating Sparse Rewards by Modeling Step-Wise and Long-Term Sampling Effects in Flow-Based GRPO",
        "id": "2602.06422",
    }
    _card_arguments = FlowGRPOTrainer._card_arguments + ["credit", "completion_stride"]

    _config_class = TPGRPOConfig
    args: TPGRPOConfig

    @property
    def _needs_completions(self) -> bool:
        return self.args.credit != "outcome"

    @property
    def _completion_stride(self) -> int:
        return self.args.completion_stride

    def _step_rewards(self, rewards: torch.Tensor) -> torch.Tensor:
        if self.args.credit == "outcome":
            return super()._step_rewards(rewards)
        incremental = incremental_rewards(rewards)
        self._record(
            {f"incremental_reward/step_{k}": value for k, value in enumerate(incremental.mean(0).tolist(), 1)}
        )
        if self.args.credit == "incremental":
            return incremental
        points = turning_point_rewards(rewards, consistent=self.args.credit == "consistent")
        share = points.aggregated.float().mean(0).tolist()
        self._record({f"turning_points/step_{k}": value for k, value in enumerate(share, 1)})
        return points.step_rewards
