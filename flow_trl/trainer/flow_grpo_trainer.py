"""Flow-GRPO: group-relative policy optimisation of flow-matching pipelines."""

from functools import partial

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from ..credit import fill_with_group_mean, group_advantages
from ..policy import Schedule
from ..rollout import Trajectory
from ..transitions import Transition, flow_step
from ..utils import sample_generator
from .diffusion_trainer import DiffusionTrainer
from .flow_grpo_config import FlowGRPOConfig


class FlowGRPOTrainer(DiffusionTrainer):
    """
    Trainer for [Flow-GRPO](https://huggingface.co/papers/2505.05470): the ODE of a flow-matching pipeline is turned into
    an SDE with the same marginals, and every step of a trajectory gets the group-normalised reward of its final image.

    Takes the arguments of [`~flow_trl.trainer.diffusion_trainer.DiffusionTrainer`], with a [`FlowGRPOConfig`].

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from flow_trl import FlowGRPOConfig, FlowGRPOTrainer

    trainer = FlowGRPOTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_funcs="ocr",
        args=FlowGRPOConfig("sd3.5-ocr", pipeline_kwargs={"height": 512, "width": 512}),
        train_dataset=load_dataset("text", data_files="prompts.txt", split="train").rename_column("text", "prompt"),
        peft_config=LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v"]),
    )
    trainer.train()
    trainer.push_to_hub()
    ```
    """

    _name = "Flow-GRPO"
    _paper = {"title": "Flow-GRPO: Training Flow Matching Models via Online RL", "id": "2505.05470"}
    _card_arguments = DiffusionTrainer._card_arguments + [
        "noise_level", "sde_type", "sde_window_size", "scale_rewards", "step_weights", "multi_objective_aggregation"
    ]  # fmt: skip

    _config_class = FlowGRPOConfig
    args: FlowGRPOConfig

    def _prepare_pipeline(self, pipe: DiffusionPipeline) -> None:
        if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
            shift = pipe.scheduler.config.get("flow_shift", 1.0)  # the name of it that is lost in `from_config`
            raise ValueError(
                f"`model` has the scheduler {type(pipe.scheduler).__name__}, but {type(self).__name__} trains "
                f"flow-matching pipelines with FlowMatchEulerDiscreteScheduler. If the model is a flow model, set "
                f"`pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={shift})`; a diffusion model is trained by "
                "DDPOTrainer or TDPORTrainer."
            )

        if pipe.scheduler.config.get("invert_sigmas"):
            raise ValueError(
                f"`model` ({type(pipe).__name__}) has a scheduler with `invert_sigmas`, whose time runs from 0 to 1; "
                f"{type(self).__name__} needs noise levels that fall from 1 to 0."
            )

    def _stochastic_steps(self, step: int) -> range:
        first, last = self.args.sde_window_range or (0, self.args.num_inference_steps - 1)
        size = self.args.num_trained_steps
        generator = sample_generator(self.args.seed, "window", step)
        start = first + int(torch.randint(last - first - size + 1, (), generator=generator))
        return range(start, start + size)

    def _transition(
        self, output: torch.Tensor, sample: torch.Tensor, step: int, schedule: Schedule, **kwargs
    ) -> Transition:
        return flow_step(
            output,
            sample,
            schedule.sigmas[step],
            schedule.sigmas[step + 1],
            noise_level=self.args.noise_level,
            sde_type=self.args.sde_type,
            sigma_max=schedule.sigmas[1],
            **kwargs,
        )

    def _step_rewards(self, rewards: torch.Tensor, prefix: str = "") -> torch.Tensor:
        """What each step earned, (N, K): here the final image's reward. `prefix` is that of the logged metrics."""
        return rewards[:, -1:].expand(-1, self.args.num_trained_steps)

    def _advantages(self, scores: torch.Tensor, rows: list[int], trajectory: Trajectory) -> torch.Tensor:
        args, scorer = self.args, self.scorer
        normalized = partial(group_advantages, num_generations=args.num_generations, scale_rewards=args.scale_rewards)
        if args.multi_objective_aggregation == "sum_then_normalize":
            return normalized(self._step_rewards(scorer.weighted(scores)))
        total = 0
        for f in scorer.trained:
            rewards = fill_with_group_mean(scores[..., f], args.num_generations)
            total = total + scorer.weights[f] * normalized(self._step_rewards(rewards, f"{scorer.names[f]}/"))
        together = (0, 1) if args.scale_rewards == "trajectory" else 0
        return total / (total.std(together, correction=0, keepdim=True) + 1e-4)

    def _step_weights(self, trajectory: Trajectory) -> torch.Tensor | float:
        if self.args.step_weights == "none":
            return 1.0
        zero = torch.zeros(1, 1)
        steps = [self._transition(zero, zero, i, trajectory.schedule, noise=zero) for i in trajectory.steps]
        noise = torch.stack([step.noise_std for step in steps])
        return noise / noise.mean()
