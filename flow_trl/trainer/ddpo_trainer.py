"""DDPO: policy optimisation of DDIM pipelines with the final reward for every denoising step."""

import copy
import functools
import itertools
import json
import logging
import os
from collections import deque

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from ..credit import PerPromptRunningMoments, temporal_advantages
from ..policy import Schedule
from ..rollout import Trajectory
from ..transitions import Transition, ddim_step
from ..utils import sample_generator
from .ddpo_config import DDPOConfig
from .diffusion_trainer import DiffusionTrainer


logger = logging.getLogger(__name__)


class DDPOTrainer(DiffusionTrainer):
    """
    Trainer for [DDPO](https://huggingface.co/papers/2305.13301): the denoising steps of a diffusion pipeline are a policy
    (DDIM with noise), and each of them gets the final image's reward, normalised by the last rewards of its prompt.

    Takes the arguments of [`~flow_trl.trainer.diffusion_trainer.DiffusionTrainer`], with a [`DDPOConfig`]. A scheduler
    that is not DDIM is replaced, on the given pipeline, by one with the same noise schedule, with a warning.

    Raises:
        TypeError, ValueError: for arguments that cannot work, such as a flow-matching pipeline, before anything is
            sampled.

    Example:

    ```python
    from datasets import Dataset
    from peft import LoraConfig
    from flow_trl import DDPOConfig, DDPOTrainer

    animals = ["a cat", "a dog", "a horse", "a rabbit"]
    trainer = DDPOTrainer(
        model="CompVis/stable-diffusion-v1-4",
        reward_funcs="aesthetic",
        args=DDPOConfig("sd1-aesthetic", generation_batch_size=64, num_generations=16),
        train_dataset=Dataset.from_dict({"prompt": animals}),
        peft_config=LoraConfig(r=4, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    )
    trainer.train()
    trainer.push_to_hub()
    ```
    """

    _name = "DDPO"
    _paper = {"title": "Training Diffusion Models with Reinforcement Learning", "id": "2305.13301"}
    _card_arguments = DiffusionTrainer._card_arguments + [
        "eta", "train_timestep_fraction", "per_prompt_stat_tracking_buffer_size", "per_prompt_stat_tracking_min_count"
    ]  # fmt: skip

    _config_class = DDPOConfig
    _kl_in_loss = False
    args: DDPOConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._scheduler = functools.cache(self._make_scheduler)
        self.moments = PerPromptRunningMoments(
            self.args.per_prompt_stat_tracking_buffer_size, self.args.per_prompt_stat_tracking_min_count
        )
        scheduler, first = self._at(0, self.args.num_inference_steps)
        first, last = int(first), int(scheduler.timesteps[-1])
        if not 0 < last <= first < scheduler.config.num_train_timesteps:
            raise ValueError(
                f"`num_inference_steps={self.args.num_inference_steps}` makes the timesteps {first} to {last}, of which each "
                f"must be from 1 (a step from 0 has no noise, so it cannot be trained) to "
                f"{scheduler.config.num_train_timesteps - 1}: use fewer steps, or set `pipe.scheduler = "
                "DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing='trailing')`."
            )

    def _prepare_pipeline(self, pipe: DiffusionPipeline) -> None:
        name, config = type(pipe.scheduler).__name__, pipe.scheduler.config
        if "Flow" in name or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
            raise ValueError(
                f"`model` has the scheduler {name} of a flow-matching pipeline, but {type(self).__name__} trains diffusion "
                "pipelines with DDIM: use TPGRPOTrainer or FlowGRPOTrainer."
            )
        if not isinstance(pipe.scheduler, DDIMScheduler):
            if config.get("trained_betas") is None and config.get("beta_start") is None:
                raise ValueError(
                    f"`model` has the scheduler {name}, whose noise schedule has no betas, so it cannot become a "
                    "DDIMScheduler: pass a pipeline of the Stable Diffusion 1.x, 2.x or XL families."
                )
            # DDIM's own defaults would clip latents as if they were pixels.
            options = {name: config.get(name, False) for name in ("clip_sample", "set_alpha_to_one")}
            options["steps_offset"] = config.get("steps_offset") or 1
            alphas = pipe.scheduler.alphas_cumprod
            pipe.scheduler = DDIMScheduler.from_config(config, **options)
            if config.get("snr_shift_scale") is not None:  # CogVideoX's, which DDIM does not know
                pipe.scheduler.alphas_cumprod = alphas
            logger.warning("The scheduler of `model`, %s, is replaced by a DDIMScheduler of its noise schedule.", name)

    def _make_scheduler(self, num_inference_steps: int) -> DDIMScheduler:
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(num_inference_steps)
        return scheduler

    def _at(self, step: int, num_inference_steps: int) -> tuple[DDIMScheduler, torch.Tensor]:
        """The scheduler of a run of so many steps, and the timestep before a step (with `strength`, of the last ones)."""
        asked = self.policy.steps_asked(num_inference_steps)
        scheduler = self._scheduler(asked)
        return scheduler, scheduler.timesteps[step + asked - num_inference_steps]

    def _stochastic_steps(self, step: int) -> range:
        return range(self.args.num_inference_steps)

    def _transition(
        self, output: torch.Tensor, sample: torch.Tensor, step: int, schedule: Schedule, **kwargs
    ) -> Transition:
        scheduler, timestep = self._at(step, len(schedule.timesteps))
        return ddim_step(output, sample, timestep, scheduler, eta=self.args.eta, **kwargs)

    def _ode_step(
        self, output: torch.Tensor, sample: torch.Tensor, step: int, next_step: int, schedule: Schedule
    ) -> torch.Tensor:
        scheduler, timestep = self._at(step, len(schedule.timesteps))
        return scheduler.step(output, timestep, sample, return_dict=False)[0]

    def _key(self, images: torch.Tensor) -> tuple:
        """
        What numbers that are drawn for a micro-batch of a generation depend on: the same however many processes there are,
        unless some images are skipped.
        """
        step = self.state.global_step - self.state.global_step % self._updates_per_generation
        first = self.accelerator.process_index * len(self._generation.rows) + int(images[0])
        return self.args.seed, step, first

    def _trained_steps(self, images: torch.Tensor, sweep: int) -> list[int]:
        steps = torch.randperm(self.args.num_inference_steps, generator=sample_generator("steps", *self._key(images)))
        return steps[: self.args.num_trained_steps].tolist()

    def _advantages(self, scores: torch.Tensor, rows: list[int], trajectory: Trajectory) -> torch.Tensor:
        rewards, penalties = self._normalized(scores, rows), self._step_penalties(trajectory)
        _, returns = temporal_advantages(rewards, torch.zeros_like(penalties), step_penalties=penalties)
        return returns

    def _normalized(self, scores: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Final rewards (N,) by the running moments of their prompts."""
        return self.moments.normalize(self.train_dataset[rows]["prompt"], self.scorer.weighted(scores[:, -1]))

    @torch.no_grad()
    def _step_penalties(self, trajectory: Trajectory) -> torch.Tensor:
        """KL penalty (N, T) of each step of all processes."""
        penalties, device = torch.zeros_like(trajectory.log_probs), self.accelerator.device
        schedule = trajectory.schedule._replace(timesteps=trajectory.schedule.timesteps.to(device))
        if self.args.beta:
            rows = torch.arange(len(penalties)).split(self.args.per_device_rollout_batch_size)
            for k, part in itertools.product(range(penalties.shape[1]), rows):
                latents, next_latents = (trajectory.latents[part, i].to(device) for i in (k, k + 1))
                output = self._reference.predict(latents, k, self._conditions(part), schedule)
                reference = self._transition(output, latents, k, schedule, next_sample=next_latents)
                penalties[part, k] = trajectory.log_probs[part, k] - reference.log_prob.cpu()
            self._record({"kl": penalties.mean().item()})
        return self.args.beta * self.accelerator.gather(penalties.to(device)).cpu()

    def _save_credit(self, folder: str) -> None:
        if self.args.should_save:
            buffers = {prompt: list(buffer) for prompt, buffer in self.moments.buffers.items()}
            with open(os.path.join(folder, "running_moments.json"), "w") as file:
                json.dump(buffers, file)

    def _load_credit(self, folder: str) -> None:
        with open(os.path.join(folder, "running_moments.json")) as file:
            buffers = json.load(file)
        size = self.moments.buffer_size
        self.moments.buffers = {prompt: deque(buffer, maxlen=size) for prompt, buffer in buffers.items()}
