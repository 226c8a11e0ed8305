"""Arguments of [`DDPOTrainer`]."""

from dataclasses import dataclass

from .arguments import described
from .diffusion_config import DiffusionConfig


@described
@dataclass
class DDPOConfig(DiffusionConfig):
    r"""
    Arguments of [`DDPOTrainer`]. Defaults are the setting of [DDPO](https://huggingface.co/papers/2305.13301) for Stable
    Diffusion 1.x, where they do not depend on the hardware.

    Only the arguments that differ from [`DiffusionConfig`] are listed.

    Args:
        learning_rate (`float`, *optional*, defaults to `1e-4`):
            Initial learning rate.
        num_inference_steps (`int`, *optional*, defaults to `50`):
            Number T of denoising steps in training.
        guidance_scale (`float`, *optional*, defaults to `5.0`):
            Strength of guidance, in sampling and in training. If `None`, the pipeline's default.
        num_generations (`int`, *optional*, defaults to `8`):
            Number of images per prompt in a generation.
        generation_batch_size (`int`, *optional*, defaults to `256`):
            Number of images in a generation, over all processes. Must be a multiple of `num_generations`.
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Clip range of the probability ratio, whose log is a mean over latent elements.
        beta (`float`, *optional*, defaults to `0.0`):
            Weight of the KL penalty in the reward of each step, `log pi(x_{t-1} | x_t) - log pi_ref(x_{t-1} | x_t)`.
            `0` switches it off.
        ema_decay (`float`, *optional*, defaults to `0.0`):
            Decay of the exponential moving average of the trained weights, which evaluation and saving use. `0`
            switches it off.
        eval_num_inference_steps (`int`, *optional*, defaults to `50`):
            Number of denoising steps in evaluation.
        eta (`float`, *optional*, defaults to `1.0`):
            Noise of the DDIM steps in training, in (0, 1].
        train_timestep_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the T steps that are trained in each generation, drawn for each micro-batch.
        per_prompt_stat_tracking_buffer_size (`int`, *optional*, defaults to `32`):
            Number of rewards that are kept of each prompt, to normalise new ones.
        per_prompt_stat_tracking_min_count (`int`, *optional*, defaults to `16`):
            Number of rewards from which on a prompt's own are used, instead of the generation's.
    """

    learning_rate: float = 1e-4
    num_inference_steps: int = 50
    guidance_scale: float | None = 5.0
    num_generations: int = 8
    generation_batch_size: int = 256
    epsilon: float = 1e-4
    beta: float = 0.0
    ema_decay: float = 0.0
    eval_num_inference_steps: int = 50
    eta: float = 1.0
    train_timestep_fraction: float = 1.0
    per_prompt_stat_tracking_buffer_size: int = 32
    per_prompt_stat_tracking_min_count: int = 16

    @property
    def num_trained_steps(self) -> int:
        return max(1, round(self.num_inference_steps * self.train_timestep_fraction))

    def _validate(self) -> None:
        self._check(
            "eta",
            0 < self.eta <= 1,
            "it must be in (0, 1]; 1 is usual. Without noise (0) a step has no probability, so there is nothing to train",
        )
        self._check("train_timestep_fraction", 0 < self.train_timestep_fraction <= 1, "it must be in (0, 1]")
        size = self.per_prompt_stat_tracking_buffer_size
        self._check("per_prompt_stat_tracking_buffer_size", size >= 1, "it must be at least 1")
        self._check(
            "per_prompt_stat_tracking_min_count",
            1 <= self.per_prompt_stat_tracking_min_count <= size,
            f"it must be from 1 to `per_prompt_stat_tracking_buffer_size={size}`, or a prompt's own rewards would never "
            "be used",
        )
        super()._validate()
