"""What all trainers of diffusers pipelines share: from prompts through images and rewards to a clipped loss."""

import time
from abc import abstractmethod
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, set_seed
from transformers.utils import logging

from ..callbacks import EMACallback, OnPolicyCallback
from ..cards import diffusion_card
from ..checkpoints import Checkpoints
from ..conditioning import Conditioning
from ..console import use_console
from ..engines import Engines, load_whole
from ..generation import Chunk, Generation, SampledChunks, Sampler
from ..held_out import Evaluations, upload_completions
from ..loading import compile_denoisers, load_pipeline, model_name, place_components, prepare_denoisers
from ..policy import ModuleProxy, PipelinePolicy, ReferencePolicy, Schedule
from ..publishing import Publishing
from ..rollout import Trajectory, euler_step, rollout
from ..scoring import RewardFunc, Scorer
from ..transitions import Transition, kl_divergence
from ..utils import Metrics, check_images, check_prompts, sample_generator
from .diffusion_config import DiffusionConfig


logger = logging.get_logger(__name__)


class DiffusionTrainer(Checkpoints, Evaluations, Publishing, Engines, Trainer):
    """
    Shared parent of the trainers of diffusers pipelines; not used by itself.

    Data flows one way: rows of the data set, prompts, rollout chunk by chunk, images, scores, credit, advantages of shape
    `(N, K)`, replayed transitions, clipped loss. A subclass says what a stochastic step is (`_transition`), which steps are stochastic
    (`_stochastic_steps`) and what each step earned (`_advantages`).

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            Hub id or folder of a pipeline, or a loaded pipeline. Its `transformer` or `unet` is trained.
        reward_funcs (`str`, `Callable` or a list of them):
            Reward functions, see [`flow_trl.rewards`]. A string names a built-in one.
        args ([`DiffusionConfig`], *optional*):
            Arguments of the trainer. If not set, the defaults, with an `output_dir` named after the model.
        train_dataset ([`~datasets.Dataset`], *optional*):
            Data set with a column `prompt`; every other column reaches the reward functions by its name.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Held-out prompts, with the same columns.
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            Further callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning-rate scheduler, as in [`~transformers.Trainer`].
        peft_config ([`~peft.LoraConfig`], *optional*):
            LoRA to train. If not set, the adapter that the pipeline already has, or else all weights of the denoiser.

    Raises:
        TypeError, ValueError: for arguments that cannot work, before anything is sampled.
    """

    _name: str
    _paper: dict[str, str]
    _config_class: type[DiffusionConfig] = DiffusionConfig
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: str | DiffusionPipeline,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: DiffusionConfig | None = None,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ):
        self.model_name = model_name(model)
        if args is None:
            args = self._config_class(f"{Path(self.model_name).name}-{type(self).__name__.removesuffix('Trainer')}")
        if not isinstance(args, self._config_class):
            raise TypeError(f"`args` must be a {self._config_class.__name__}, not {type(args).__name__} ({args!r}).")
        self.scorer = Scorer(
            reward_funcs,
            args.reward_weights,
            args.out_of_domain_rewards,
            reward_timeout=args.reward_timeout,
            reward_retries=args.reward_retries,
            reward_on_error=args.reward_on_error,
        )
        sets = self._check_sets(args, train_dataset, eval_dataset)
        self._generations_per_epoch = len(train_dataset or []) // (args.generation_batch_size // args.num_generations)

        if not isinstance(peft_config, LoraConfig | None):
            raise TypeError(f"`peft_config={peft_config!r}` is a {type(peft_config).__name__}: pass a `LoraConfig`.")
        dtype = torch.bfloat16 if args.bf16 and peft_config else torch.float32
        load_whole()
        self.pipe = load_pipeline(model, dtype, args.model_init_kwargs or {})
        self._prepare_pipeline(self.pipe)
        options = {
            "negative_prompt": args.negative_prompt,
            "offload_text_encoders": args.offload_text_encoders,
            **(args.pipeline_kwargs or {}),
        }
        self.policy = PipelinePolicy(self.pipe, guidance_scale=args.guidance_scale, **options)
        eval_guidance = args.guidance_scale if args.eval_guidance_scale is None else args.eval_guidance_scale
        self.eval_policy = PipelinePolicy(self.pipe, guidance_scale=eval_guidance, **options)
        columns = self.policy.columns(args.pipeline_columns, {name: data.column_names for name, data in sets.items()})
        for name, dataset in sets.items():
            check_images(name, dataset, columns)
        self._sampler = Sampler(self.policy, self.scorer, args.overlap_rewards, columns)
        self._eval_sampler = Sampler(self.eval_policy, self.scorer, args.overlap_rewards, columns)
        self.scorer.check_videos(self.policy.makes_videos)

        set_seed(args.seed)  # the adapter's weights are drawn before `Trainer` does this
        self.is_lora = prepare_denoisers(self.pipe, self.policy.denoisers, peft_config)
        denoisers, denoiser = self.policy.denoisers, self.policy.denoiser
        if args.bf16 or args.fp16:
            cast_training_params(denoiser, dtype=torch.float32)
        if args.activation_checkpointing:
            enable = [part.enable_gradient_checkpointing for part in denoisers.values()]
            denoiser.activation_checkpointing_enable = lambda **kwargs: [function() for function in enable]

        if len(denoisers) > 1 and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # an update evaluates one of them
        super().__init__(
            model=denoiser,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.console, self.commit_scheduler = use_console(self), upload_completions(args)
        self._check_engine()
        processes = self.accelerator.num_processes
        images = args.per_device_train_batch_size * processes * args.updates_per_generation
        steps = args.num_trained_steps // args.num_sweeps
        if args.gradient_accumulation_steps * images != args.generation_batch_size * steps:
            raise ValueError(
                f"`args.gradient_accumulation_steps={args.gradient_accumulation_steps}` does not fit {processes} processes "
                f"and `args.generation_batch_size={args.generation_batch_size}`: make `args` in the process that trains, "
                "and do not change its batch sizes afterwards."
            )
        place_components(self.pipe, denoisers, self.accelerator.device, args.offload_text_encoders)
        compile_denoisers(denoisers, self.accelerator)
        self._trained = {name: weight for name, weight in denoiser.named_parameters() if weight.requires_grad}
        self.ema = None
        if args.ema_decay:
            self.ema = EMACallback(self._trained, args.ema_decay, args.ema_update_steps)
            self.add_callback(self.ema)
        self.add_callback(OnPolicyCallback(self))
        self._reference = ReferencePolicy(self.policy, self.is_lora) if args.beta else None
        if self._reference is not None and not self.is_lora and self.accelerator.native_amp:
            # The copy computes in the precision of the policy
            self.accelerator.prepare_model(self._reference.denoiser, evaluation_mode=True)
        self._generation: Generation | None = None
        self._conditioning: Conditioning | None = None
        self._conditioned: tuple[torch.Tensor | None, Conditioning | None] = None, None
        self._resumed_from: str | None = None
        self._is_checked = False
        self._completions: tuple[list, dict[str, list], list[int], list[float]] | None = None
        self._metrics = Metrics()
        self._totals = {"total_nfe": 0, "total_reward_calls": 0}

    def _check_sets(
        self,
        args: DiffusionConfig,
        train_dataset: datasets.Dataset | None,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | None,
    ) -> dict[str, datasets.Dataset]:
        """The data sets by the names that errors give them."""
        evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        sets = {"train_dataset": train_dataset}
        sets |= {f"eval_dataset[{key!r}]" if key else "eval_dataset": value for key, value in evaluated.items()}
        sets = {name: dataset for name, dataset in sets.items() if dataset is not None}
        for name, dataset in sets.items():
            self._check_dataset(name, dataset)
        needed = args.generation_batch_size // args.num_generations
        if train_dataset is not None and len(train_dataset) < needed:
            raise ValueError(
                f"`train_dataset` has {len(train_dataset)} prompts, but a generation needs {needed} = "
                f"`generation_batch_size={args.generation_batch_size}` / `num_generations={args.num_generations}`: "
                "make the generation smaller or add prompts."
            )
        return sets

    def _check_dataset(self, name: str, dataset: Any) -> None:
        check_prompts(name, dataset)
        self.scorer.check(name, [column for column in dataset.column_names if column != "prompt"])

    # What a subclass adds

    def _prepare_pipeline(self, pipe: DiffusionPipeline) -> None:
        """Raises if this method cannot train the pipeline; may give it another scheduler."""

    @abstractmethod
    def _transition(
        self, output: torch.Tensor, sample: torch.Tensor, step: int, schedule: Schedule, **kwargs
    ) -> Transition:
        """One stochastic step from `sample` (N, ...), with `noise` or to `next_sample` in `kwargs`."""

    @abstractmethod
    def _stochastic_steps(self, step: int) -> range:
        """Indices of the K stochastic steps of the generation at update `step`."""

    @abstractmethod
    def _advantages(self, scores: torch.Tensor, rows: list[int], trajectory: Trajectory) -> torch.Tensor:
        """
        Advantages (N, K) from the scores of all processes, (N, K + 1, F) with completions and else (N, 1, F), the rows of
        all N prompts, and the trajectories of this process.
        """

    def _step_weights(self, trajectory: Trajectory) -> torch.Tensor | float:
        """Weights (K,) of the steps in the loss."""
        return 1.0

    _needs_completions = False
    _completion_stride = 1
    _kl_in_loss = True
    _ode_step = staticmethod(euler_step)

    def _trained_steps(self, images: torch.Tensor, sweep: int) -> list[int]:
        """Stochastic steps (0 to K - 1) at which the images of a micro-batch are trained in a sweep."""
        return list(range(self.args.num_trained_steps))

    def _save_credit(self, folder: str) -> None:
        """Adds to a checkpoint what credit assignment keeps from one generation to the next."""

    def _load_credit(self, folder: str) -> None:
        """Reads what `_save_credit` wrote."""

    # A generation: prompts, images, scores, advantages

    @property
    def _updates_per_generation(self) -> int:
        return self.args.updates_per_generation * self.args.num_sweeps * self.args.num_iterations

    def _rows(self, step: int) -> list[int]:
        """Rows of the data set for the generation at update `step`, of all processes."""
        epoch, index = divmod(step // self._updates_per_generation, self._generations_per_epoch)
        rows = torch.arange(len(self.train_dataset))
        if self.args.shuffle_dataset:
            rows = torch.randperm(len(rows), generator=sample_generator(self.args.seed, "epoch", epoch))
        prompts = self.args.generation_batch_size // self.args.num_generations
        rows = rows[index * prompts : (index + 1) * prompts].repeat_interleave(self.args.num_generations)
        return rows.tolist()

    def _generate(self, step: int) -> None:
        """Samples and scores a generation, and sets what the updates need of it."""
        self._generation = None  # its memory is needed
        args, rank, all_rows = self.args, self.accelerator.process_index, self._rows(step)
        size = len(all_rows) // self.accelerator.num_processes
        rows = all_rows[rank * size : (rank + 1) * size]
        self._encode(rows)
        chunks = SampledChunks(args.output_dir, rank, self._sampling_key(step))
        sampled = self._scored(
            self._sampler,
            self.train_dataset,
            rows,
            partial(self._sample, step),
            batch_size=args.per_device_rollout_batch_size,
            decode_dtype=torch.bfloat16 if args.bf16 and self.accelerator.device.type != "cpu" else None,
            sampled_chunks=chunks,
            finished_functions=self.scorer.in_domain,
            num_images=args.num_images_to_save if args.log_completions else 0,
        )
        self._raise_together(sampled)
        chunks.clear()
        scores = self.accelerator.gather(sampled.scores.to(self.accelerator.device)).cpu()  # (N, K + 1, F)
        rewards = self.scorer.weighted(scores)
        advantages = self._advantages(scores, all_rows, sampled.trajectory)
        advantages = advantages.clamp(-args.adv_clip_max, args.adv_clip_max) * self._step_weights(sampled.trajectory)
        sizes = {"num_generations": args.num_generations, "updates": args.updates_per_generation}
        self._set_generation(Generation.make(rows, sampled.trajectory, advantages, **sizes, process_index=rank))

        groups, calls, nfe = rewards[:, -1].view(-1, args.num_generations), scores.shape[1], sampled.evaluations / size
        self._record(
            {
                "reward": rewards[:, -1].mean().item(),
                "reward_std": groups.std(dim=1, correction=min(1, args.num_generations - 1)).mean().item(),
                "frac_reward_zero_std": (groups == groups[:, :1]).all(dim=1).float().mean().item(),
                "nfe": nfe,
                "reward_calls": calls,
            }
            | {f"time/{name}": sampled.seconds[name] for name in ("sampling", "decoding", "reward", "reward_wait")}
            | self.scorer.metrics(scores[:, -1])
            | sampled.logged()
        )
        self._totals["total_nfe"] += round(nfe * args.generation_batch_size)
        self._totals["total_reward_calls"] += calls * args.generation_batch_size
        for name in self.scorer.unscored(scores):
            logger.warning_once(
                f"The reward function `{name}` gave no score to any image of a generation (all `None`): it trains nothing. "
                "Look at the columns that it needs, or leave it out."
            )
        if args.log_completions:
            columns = {"prompt": self.train_dataset[all_rows]["prompt"], "advantage": advantages.mean(dim=1).tolist()}
            columns |= dict(zip(self.scorer.names, scores[:, -1].T.tolist(), strict=True)) | sampled.columns()
            table = {"step": [step] * len(all_rows), **columns}
            self._completions = sampled.images, table, rows, rewards[: len(rows), -1].tolist()

    def _set_generation(self, generation: Generation) -> None:
        self._generation, self._schedule = generation, generation.schedule(self.accelerator.device)

    def _encode(self, rows: list[int]) -> None:
        self._conditioning, self._prompt_index = self._sampler.encode(self.train_dataset, rows)

    def _conditions(self, images: torch.Tensor) -> Conditioning:
        """Conditioning of some of this process's images, on its device."""
        return self._conditioning.on(self.accelerator.device, [self._prompt_index[image] for image in images.tolist()])

    def _sample(self, step: int, chunk: Chunk, conditioning: Conditioning, index: list[int]) -> Trajectory:
        args = self.args
        share = args.generation_batch_size // self.accelerator.num_processes
        first = self.accelerator.process_index * share + chunk.first
        generators = [
            sample_generator(args.seed, step, row, image % args.num_generations)
            for image, row in enumerate(chunk.rows, first)
        ]
        return rollout(
            self.policy,
            conditioning,
            index,
            generators,
            num_inference_steps=args.num_inference_steps,
            transition=self._transition,
            ode_step=self._ode_step,
            steps=self._stochastic_steps(step),
            completions=self._needs_completions,
            completion_stride=self._completion_stride,
            batch_size=args.per_device_rollout_batch_size,
        )

    def _record(self, metrics: dict[str, float | torch.Tensor]) -> None:
        self._metrics.record(metrics)

    # Updates: transitions replayed, a clipped loss

    def get_train_dataloader(self) -> DataLoader:
        # Only counts the micro-batches of an epoch; which rows a generation takes follows from its number (`_rows`).
        if self.train_dataset is None:
            raise ValueError("`train_dataset=None`: training needs a data set with a column `prompt`.")
        micro_batches = self._updates_per_generation * self.args.gradient_accumulation_steps
        count = self._generations_per_epoch * micro_batches * self.accelerator.num_processes
        return self.accelerator.prepare(DataLoader(range(count), batch_size=1, collate_fn=list))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        position = self.state.global_step % self._updates_per_generation
        if self.args.check_pipeline and not self._is_checked:
            self._compare_with_pipeline()
        if position == 0:
            self._generate(self.state.global_step)
        elif self._generation is None:
            self._resume_generation()
        self._update_started = time.perf_counter()
        self.model_wrapped.train()
        for denoiser in self.policy.denoisers.values():
            denoiser.training = False  # the output of HiDream's has another shape in training; its experts must train
        return self._micro_batches(position), None

    def _compare_with_pipeline(self) -> None:
        examples = self.train_dataset.select_columns(["prompt", *self._sampler.columns])[:16]
        steps, prompts = min(3, self.args.num_inference_steps), examples.pop("prompt")
        deviation = self.policy.check(prompts, steps, self._ode_step, **examples)
        self._record({"check_pipeline/max_deviation": deviation})
        self._is_checked = True

    def _micro_batches(self, position: int) -> list[dict[str, Any]]:
        """The micro-batches of an update, by its number in the generation."""
        generation, size = self._generation, self.args.per_device_train_batch_size
        sweep, update = divmod(position, self.args.updates_per_generation)
        skipped = 0 if self.is_deepspeed_enabled else int(generation.skipped[update])  # its backward needs gradients
        batches = []
        for number, chunk in enumerate(generation.order[update].split(size), 1):
            for k in self._trained_steps(chunk, sweep % self.args.num_sweeps):
                batches.append({"images": chunk, "step": k, "skip": number * size <= skipped})
        batches[-1]["skip"] = False  # gradients are reduced over processes in the last micro-batch
        return batches

    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(ModuleProxy(model, model), inputs, num_items_in_batch)

    def _prepare_inputs(self, inputs):
        return inputs  # where images and steps are looked up, on the CPU

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, generation, device = self.args, self._generation, self.accelerator.device
        images, k = inputs["images"], inputs["step"]
        if inputs["skip"]:
            zero = torch.zeros((), device=device)
            names = ["clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "ratio/max_deviation"]
            self._record(dict.fromkeys(names + ["kl"] * self._has_kl_loss, zero))
            return zero.clone().requires_grad_()
        step = int(generation.first_step) + k
        if images is not self._conditioned[0]:  # a chunk's steps follow one another
            self._conditioned = images, self._conditions(images)
        schedule, conditioning = self._schedule, self._conditioned[1]
        batch = generation.micro_batch(images, k, device)

        if self._has_kl_loss:
            output = self._reference.predict(batch.latents, step, conditioning, schedule)
            reference = self._transition(output, batch.latents, step, schedule, next_sample=batch.next_latents)
        self.policy.forward = model
        output = self.policy.predict(batch.latents, step, conditioning, schedule, grad=True)
        transition = self._transition(output, batch.latents, step, schedule, next_sample=batch.next_latents)
        ratio = (transition.log_prob - batch.log_probs).exp()
        clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
        loss = torch.maximum(-batch.advantages * ratio, -batch.advantages * clipped)

        # Weighted, the means over micro-batches and processes are those over the images that are not skipped
        ratio, weights = ratio.detach(), batch.weights
        low = (weights * ((ratio < 1 - args.epsilon) & (batch.advantages < 0))).mean()
        high = (weights * ((ratio > 1 + args.epsilon) & (batch.advantages > 0))).mean()
        self._record(
            {
                "clip_ratio/low_mean": low,
                "clip_ratio/high_mean": high,
                "clip_ratio/region_mean": low + high,
                "ratio/max_deviation": ((weights > 0) * (ratio - 1).abs()).max(),
            }
        )
        if self._has_kl_loss:
            kl = kl_divergence(transition.mean, reference.mean, transition.noise_std)
            self._record({"kl": (weights * kl.detach()).mean()})
            loss = loss + args.beta * kl
        return (weights * loss).mean()

    @property
    def _has_kl_loss(self) -> bool:
        return self._kl_in_loss and self.args.beta > 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._metrics:
            self._record({"time/update": time.perf_counter() - self._update_started})
            logs |= self._metrics.reduced(self.accelerator) | self._totals
            if self._completions is not None:
                self._save_completions(*self._completions)
                self._completions = None
        super().log(logs, start_time)

    # Weights that are evaluated and saved, and their card

    @contextmanager
    def _evaluated_weights(self):
        """Within this context the denoiser has the weights that are evaluated and saved."""
        with self.ema.applied() if self.ema is not None else nullcontext():
            self._reshard()
            yield
        self._reshard()

    _make_card = staticmethod(diffusion_card)
    _card_note: str | None = None
    _card_arguments = [
        "num_inference_steps", "guidance_scale", "num_generations", "generation_batch_size", "updates_per_generation",
        "num_iterations", "epsilon", "beta", "adv_clip_max", "ema_decay", "ema_update_steps",
        "eval_num_inference_steps", "eval_guidance_scale", "seed",
    ]  # fmt: skip
