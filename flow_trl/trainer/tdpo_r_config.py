"""Arguments of [`TDPORTrainer`]."""

import math
from dataclasses import dataclass, field

from .arguments import described
from .ddpo_config import DDPOConfig


@described
@dataclass
class TDPORConfig(DDPOConfig):
    r"""
    Arguments of [`TDPORTrainer`]. Defaults are the setting of [TDPO-R](https://huggingface.co/papers/2402.08552) for
    Stable Diffusion 1.x, where they do not depend on the hardware.

    Only the arguments that differ from [`DDPOConfig`] are listed. A pass over a generation takes T *sweeps*: each image
    is trained at one step of its trajectory in each, and `updates_per_generation` optimizer updates follow per sweep.
    Checkpoints are smaller at the end of a generation, where they need not keep its latents: let `save_steps` be a
    multiple of `updates_per_generation` times T.

    Args:
        updates_per_generation (`int`, *optional*, defaults to `1`):
            Number of parts into which a generation's images are split, with one optimizer update each in every sweep.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount of a step in the return.
        use_critic (`bool`, *optional*, defaults to `True`):
            Whether to learn a temporal critic. Without, this is DDPO with the sweeps of TDPO.
        critic_encoder (`str`, *optional*):
            Frozen image encoder of the critic: Hub id or folder of a CLIP. If not set, that of the first trained reward
            that has one, or else `"openai/clip-vit-large-patch14"`. (Pass any other to the trainer.)
        critic_decoder (`str`, *optional*):
            Hub id or folder of an [`~diffusers.AutoencoderTiny`] that decodes latents for the critic, such as
            `"madebyollin/taesd"`. If not set, the pipeline's own autoencoder.
        critic_learning_rate (`float`, *optional*, defaults to `1e-4`):
            Learning rate of the critic.
        cliprange_value (`float`, *optional*, defaults to `0.2`):
            The critic's values are clipped to plus or minus this around those of the rollout.
        reset_neurons (`str`, *optional*, defaults to `"active"`):
            Neurons of the critic that are reset: `"active"` (TDPO-R), `"dormant"`, `"all"` or `"none"` (TDPO).
        reset_every (`int`, *optional*, defaults to `10`):
            Number of generations between two resets.
        dormant_threshold (`float`, *optional*, defaults to `0.0`):
            Score up to which a neuron is dormant.
    """

    updates_per_generation: int = 1
    gamma: float = 1.0
    use_critic: bool = True
    critic_encoder: str | None = None
    critic_decoder: str | None = None
    critic_learning_rate: float = 1e-4
    cliprange_value: float = 0.2
    reset_neurons: str = field(default="active", metadata={"choices": ["active", "dormant", "all", "none"]})
    reset_every: int = 10
    dormant_threshold: float = 0.0

    @property
    def num_sweeps(self) -> int:
        return self.num_trained_steps

    def _validate(self) -> None:
        self._check("gamma", 0 <= self.gamma <= 1, "it must be in [0, 1]; 1 does not discount")
        self._check(
            "critic_learning_rate", 0 < self.critic_learning_rate < math.inf, "it must be above 0; 1e-4 is the paper's"
        )
        self._check("cliprange_value", self.cliprange_value > 0, "it must be above 0; 0.2 is usual")
        for name, default in (("gamma", 1.0), ("critic_encoder", None), ("critic_decoder", None)):
            valid = self.use_critic or getattr(self, name) == default
            self._check(name, valid, "it has a meaning only with `use_critic=True`")
        self._check(
            "reset_every", self.reset_every >= 1, "it must be at least 1; `reset_neurons='none'` switches resets off"
        )
        self._check(
            "dormant_threshold",
            0 <= self.dormant_threshold < math.inf,
            "it must be at least 0; scores are not negative",
        )
        super()._validate()
