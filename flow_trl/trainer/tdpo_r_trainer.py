"""TDPO-R: a temporal critic gives each denoising step its own advantage, and is reset against primacy bias."""

import copy
import os
import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from ..credit import temporal_advantages
from ..critic import TemporalCritic, dormant_neurons, reset_neurons
from ..policy import PipelinePolicy
from ..rewards.clip import ClipEncoder
from ..rollout import Trajectory
from ..utils import sample_generator, to_device
from .ddpo_trainer import DDPOTrainer
from .tdpo_r_config import TDPORConfig


class _UpdateCritic(TrainerCallback):
    """Updates the critic whenever the policy is updated."""

    def __init__(self, update: Callable[[], None]):
        self.update = update

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.update()


class TDPORTrainer(DDPOTrainer):
    r"""
    Trainer for [TDPO-R](https://huggingface.co/papers/2402.08552). The changes against [`DDPOTrainer`] are the
    advantage of a step, which is its return minus the value that a critic gives to the image of the noisy latent before
    it, whitened over the generation; updates after each sweep over the generation at one step per image; and the reset of
    the critic's active neurons.

    The critic's loss is \\( \frac12 \max\left((V - G)^2, (\operatorname{clip}(V, V_\text{old} \pm c) - G)^2\right) \\).

    Takes the arguments of [`~flow_trl.trainer.diffusion_trainer.DiffusionTrainer`], with a [`TDPORConfig`], and:

    Args:
        critic_encoder (`Callable`, *optional*):
            Frozen image encoder of the critic, in place of that of the config: called with images `(B, 3, H, W)` in
            [0, 1] on the trainer's device, it returns embeddings `(B, d)`.

    Example:

    ```python
    from peft import LoraConfig
    from flow_trl import TDPORConfig, TDPORTrainer, tiny
    from flow_trl.rewards.clip import ClipScore

    trainer = TDPORTrainer(
        model=tiny.load_diffusion_pipeline(),
        reward_funcs=ClipScore(tiny.CLIP_FOLDER),
        args=TDPORConfig("tiny-clip", num_inference_steps=10, out_of_domain_rewards=["jpeg_compressibility"]),
        train_dataset=tiny.load_prompts("scenes", "train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    )
    trainer.train()
    trainer.push_to_hub()
    ```
    """

    _paper = {
        "title": "Confronting Reward Overoptimization for Diffusion Models: A Perspective of Inductive and Primacy Biases",
        "id": "2402.08552",
    }
    _card_arguments = DDPOTrainer._card_arguments + [
        "gamma", "use_critic", "critic_learning_rate", "cliprange_value", "reset_neurons", "reset_every",
        "dormant_threshold",
    ]  # fmt: skip

    _config_class = TDPORConfig
    args: TDPORConfig

    @property
    def _name(self) -> str:
        if not self.args.use_critic:
            return "DDPO"
        return "TDPO" if self.args.reset_neurons == "none" else "TDPO-R"

    @property
    def _card_note(self) -> str | None:
        if not self.args.use_critic:
            return None
        return (
            "`critic.safetensors` is the head of the temporal critic (`flow_trl.critic.TemporalCritic`), for further "
            "training; images do not need it."
        )

    def __init__(self, *args, critic_encoder: Callable[[torch.Tensor], torch.Tensor] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.args.use_critic:
            return
        self._critic_policy = self._make_critic_policy()
        self._encoder = self._choose_encoder(critic_encoder)
        self._place_denoiser()
        self.critic = TemporalCritic(self._embedding_size(), generator=sample_generator(self.args.seed, "critic")).to(
            self.accelerator.device
        )
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=self.args.critic_learning_rate)
        self._dormant: dict[str, torch.Tensor] = {}
        self._critic_inputs: dict[str, torch.Tensor] = {}
        self.add_callback(_UpdateCritic(self._update_critic))

    def _make_critic_policy(self) -> PipelinePolicy:
        if self.args.critic_decoder is None:
            return self.policy
        try:
            if AutoencoderTiny.load_config(self.args.critic_decoder)["_class_name"] != "AutoencoderTiny":
                raise ValueError("it is a model of another class")
            decoder = AutoencoderTiny.from_pretrained(self.args.critic_decoder, dtype=self.pipe.vae.dtype)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`critic_decoder={self.args.critic_decoder!r}` cannot be loaded as an AutoencoderTiny ({error}): pass the Hub id or "
                "folder of one, such as 'madebyollin/taesd' (Stable Diffusion 1.x) or 'madebyollin/taesdxl'."
            ) from error
        channels = self.policy.denoiser.config.in_channels
        if decoder.config.latent_channels != channels:
            raise ValueError(
                f"`critic_decoder={self.args.critic_decoder!r}` decodes latents of {decoder.config.latent_channels} "
                f"channels, those of `model` have {channels}: pass the decoder of this family."
            )
        policy = copy.copy(self.policy)
        policy.pipe = copy.copy(self.pipe)
        policy.pipe.__dict__["vae"] = decoder.to(self.accelerator.device).requires_grad_(False).eval()
        return policy

    def _choose_encoder(self, given: Callable | None) -> Callable[[torch.Tensor], torch.Tensor]:
        if given is not None and not callable(given):
            raise ValueError(
                f"`critic_encoder={given!r}` is not callable: pass a function of images, or a name as `args.critic_encoder`."
            )
        if given is not None and self.args.critic_encoder is not None:
            raise ValueError(
                f"`critic_encoder` and `args.critic_encoder={self.args.critic_encoder!r}` are both given: leave one out."
            )
        trained = [self.scorer.funcs[f] for f in self.scorer.trained]
        encoders = [reward.encoder for reward in trained if hasattr(reward, "encoder")]
        if given is None and self.args.critic_encoder is None and encoders:
            return encoders[0]
        encoder = given
        if encoder is None:
            name = self.args.critic_encoder or "openai/clip-vit-large-patch14"
            encoder = ClipEncoder(name, device=self.accelerator.device)
        for own in encoders:
            sizes = [getattr(e, "image_size", None) for e in (encoder, own)]
            if None not in sizes and sizes[0] != sizes[1]:
                raise ValueError(
                    f"`critic_encoder` takes images of {sizes[0]} pixels, the reward function sees images of {sizes[1]}: "
                    "the critic would not see what is rewarded. Leave `critic_encoder` out for the reward's own encoder."
                )
        return encoder

    def _embedding_size(self) -> int:
        conditioning = self.policy.encode([""])
        latents = self.policy.start(conditioning, 2, torch.Generator().manual_seed(0)).latents
        embeddings = self._embed(latents, conditioning)
        is_tensor = isinstance(embeddings, torch.Tensor)
        if not is_tensor or embeddings.ndim != 2 or len(embeddings) != 1 or not embeddings.isfinite().all():
            made = f"a tensor of shape {tuple(embeddings.shape)}" if is_tensor else f"a {type(embeddings).__name__}"
            raise ValueError(
                f"`critic_encoder` made {made} of one image: it must return finite embeddings, a tensor (B, d), of images "
                "(B, 3, H, W)."
            )
        return embeddings.shape[1]

    @torch.no_grad()
    def _embed(self, latents: torch.Tensor, conditioning) -> torch.Tensor:
        """Embeddings (B, d) of latents (B, ...), decoded with their noise."""
        images = self._critic_policy.decode(latents, conditioning, output_type="pt")
        return self._encoder(images.float())

    def _trained_steps(self, images: torch.Tensor, sweep: int) -> list[int]:
        return super()._trained_steps(images, sweep)[sweep : sweep + 1]

    def _advantages(self, scores: torch.Tensor, rows: list[int], trajectory: Trajectory) -> torch.Tensor:
        if not self.args.use_critic:
            return super()._advantages(scores, rows, trajectory)
        started, args = time.perf_counter(), self.args
        size, num_steps = trajectory.log_probs.shape
        embeddings = []
        with self.console.progress(size * num_steps, "Embedding for the critic") as bar:
            for part in torch.arange(size * num_steps).split(args.per_device_rollout_batch_size):
                images, steps = part // num_steps, part % num_steps
                embeddings.append(self._embed(trajectory.latents[images, steps], self._conditions(images)))
                bar.update(len(part))
        embeddings = torch.cat(embeddings).to(self.accelerator.device, torch.float32).unflatten(0, (size, num_steps))
        self._watch_neurons(self.accelerator.gather(embeddings))
        self.critic.eval()
        with torch.no_grad():
            values = self.critic(embeddings)
        self.critic.train()
        all_values = self.accelerator.gather(values).cpu()
        advantages, returns = temporal_advantages(
            self._normalized(scores, rows),
            all_values,
            gamma=args.gamma,
            step_penalties=self._step_penalties(trajectory),
        )
        mine = returns.split(size)[self.accelerator.process_index].to(values.device)
        self._critic_inputs = {"embeddings": embeddings, "values": values, "returns": mine}
        residual, total = (returns - all_values).var(correction=0).item(), returns.var(correction=0).item()
        explained = 1 - residual / total if total > 1e-8 else 0.0  # all rewards are equal
        self._record({"critic/explained_variance": explained, "time/critic": time.perf_counter() - started})
        return advantages

    def _watch_neurons(self, embeddings: torch.Tensor) -> None:
        """Logs dormant neurons and, when it is due, resets those that `reset_neurons` names."""
        args, generation = self.args, self.state.global_step // self._updates_per_generation
        dormant = dormant_neurons(self.critic, embeddings, args.dormant_threshold)
        now = torch.cat(list(dormant.values()))
        self._record({"critic/dormant_share": now.float().mean().item()})
        if self._dormant:
            last = torch.cat(list(self._dormant.values()))
            self._record({"critic/dormant_overlap": ((now & last).sum() / last.sum().clamp(min=1)).item()})
        self._dormant = dormant
        if args.reset_neurons == "none" or generation == 0 or generation % args.reset_every:
            return
        chosen = {
            name: {"active": ~mask, "dormant": mask, "all": torch.ones_like(mask)}[args.reset_neurons]
            for name, mask in dormant.items()
        }
        generator = sample_generator(args.seed, "reset", generation)
        reset_neurons(self.critic, chosen, self.critic_optimizer, generator)
        self._record({"critic/reset_share": torch.cat(list(chosen.values())).float().mean().item()})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.args.use_critic:
            self._add_critic_gradient(inputs["images"], inputs["step"])
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _add_critic_gradient(self, images: torch.Tensor, k: int) -> None:
        device = self.accelerator.device
        index = to_device(images, device)
        embeddings, old, returns = (
            self._critic_inputs[name][index, k] for name in ("embeddings", "values", "returns")
        )
        seed = sample_generator("dropout", self.state.global_step, k, *self._key(images)).initial_seed()
        devices = [] if device.type == "cpu" else [device.index or 0]
        with torch.random.fork_rng(devices, device_type=device.type):  # the same whatever the processes
            torch.manual_seed(seed)
            values = self.critic(embeddings)
        clipped = torch.clamp(values, old - self.args.cliprange_value, old + self.args.cliprange_value)
        loss = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).mean()
        (loss / self.args.gradient_accumulation_steps).backward()
        self._record({"critic/loss": loss.detach()})

    def _update_critic(self) -> None:
        parameters = list(self.critic.parameters())
        gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
        gradient = self.accelerator.reduce(gradient, reduction="mean")
        for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))
        if self.args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad()

    # Saving and resuming

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.use_critic and self.args.should_save:
            save_file(self.critic.state_dict(), os.path.join(output_dir or self.args.output_dir, "critic.safetensors"))

    @property
    def _critic_inputs_name(self) -> str:
        return f"critic_inputs_{self.accelerator.process_index}.safetensors"

    def _save_credit(self, folder: str) -> None:
        super()._save_credit(folder)
        if not self.args.use_critic:
            return
        if self.state.global_step % self._updates_per_generation:
            save_file(self._critic_inputs, os.path.join(folder, self._critic_inputs_name))
        if self.args.should_save:
            state = {f"dormant.{name}": mask for name, mask in self._dormant.items()}
            for name, parameter in self.critic.named_parameters():
                moments = self.critic_optimizer.state[parameter]
                state |= {f"optimizer.{moment}.{name}": value for moment, value in moments.items()}
            save_file(state, os.path.join(folder, "critic_training.safetensors"))

    def _load_credit(self, folder: str) -> None:
        super()._load_credit(folder)
        if not self.args.use_critic:
            return
        device = self.accelerator.device
        weights = load_file(os.path.join(folder, "critic.safetensors"))
        size = weights["layers.0.weight"].shape[1]
        if size != self.critic.embedding_dim:
            raise ValueError(
                f"`resume_from_checkpoint={folder!r}` has a critic of embeddings of {size} numbers, `critic_encoder` makes "
                f"{self.critic.embedding_dim}: use the encoder of the run that wrote it."
            )
        self.critic.load_state_dict(weights)
        state = load_file(os.path.join(folder, "critic_training.safetensors"))
        self._dormant = {
            name.removeprefix("dormant."): mask.to(device)
            for name, mask in state.items()
            if name.startswith("dormant.")
        }
        for name, parameter in self.critic.named_parameters():
            self.critic_optimizer.state[parameter] = {
                moment: state[f"optimizer.{moment}.{name}"].to("cpu" if moment == "step" else device)
                for moment in ("step", "exp_avg", "exp_avg_sq")
            }
        if os.path.isfile(os.path.join(folder, "critic_inputs_0.safetensors")):  # written within a generation
            tensors = load_file(os.path.join(folder, self._critic_inputs_name))
            self._critic_inputs = {name: tensor.to(device) for name, tensor in tensors.items()}
