"""Arguments that all trainers of diffusers pipelines share."""

import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from .arguments import Arguments, described


@described
@dataclass
class DiffusionConfig(Arguments, TrainingArguments):
    r"""
    Arguments shared by [`FlowGRPOConfig`], [`DDPOConfig`] and their relatives; not used by itself.

    Only the arguments that differ from [`~transformers.TrainingArguments`] are listed. A *generation* is one round of
    sampling and scoring; `updates_per_generation * num_iterations` optimizer updates follow it (per sweep, in
    [`TDPORConfig`]). A micro-batch is
    `per_device_train_batch_size` images at one denoising step.

    Args:
        learning_rate (`float`, *optional*, defaults to `3e-4`):
            Initial learning rate.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Learning-rate schedule.
        logging_steps (`float`, *optional*, defaults to `1`):
            Number of updates between two logs.
        bf16 (`bool`, *optional*):
            Whether to train in bfloat16. If not set, `True` on GPUs that have it, unless `fp16` or `use_cpu` is set.
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            Not used: every column reaches the reward functions.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~diffusers.DiffusionPipeline.from_pretrained`], used when `model` is a name.
        pipeline_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for each call of the pipeline, for example `{"height": 512, "width": 512}`.
        pipeline_columns (`list[str]`, *optional*):
            Columns of the data sets that the pipeline is given with each prompt, such as `image`, `mask_image` or
            `control_image`: images, paths, or lists of them. If not set, those of the usual names that its call takes.
        negative_prompt (`str`, *optional*):
            Negative prompt for guidance. If not set, what the pipeline takes by itself.
        num_inference_steps (`int`, *optional*, defaults to `10`):
            Number of denoising steps that are run in training (with `strength` below 1 the schedule has more).
        guidance_scale (`float`, *optional*):
            Strength of guidance, in sampling and in training. If not set, the pipeline's default.
        num_generations (`int`, *optional*, defaults to `24`):
            Number of images per prompt in a generation (the group).
        generation_batch_size (`int`, *optional*, defaults to `1152`):
            Number of images in a generation, over all processes. Must be a multiple of `num_generations`.
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`):
            Whether a loss that is not finite is left out of the logs. To look at it, each micro-batch waits for the GPU.
        per_device_rollout_batch_size (`int`, *optional*, defaults to `16`):
            Number of images that are sampled together, with all their completions: the number of latents in each call of
            the denoiser. Memory is that of two such chunks of images, however large a generation is.
        per_device_decode_batch_size (`int`, *optional*):
            Largest number of latents in one call of the decoder. If not set, `per_device_rollout_batch_size` (in
            evaluation `per_device_eval_batch_size`).
        offload_text_encoders (`bool`, *optional*, defaults to `False`):
            Whether the text encoders wait on the CPU except while they encode. Each prompt is encoded once (embeddings
            are kept on the CPU, up to 2 GiB), so this costs little.
        check_pipeline (`bool`, *optional*, defaults to `True`):
            Whether to compare, before the first generation, a short rollout of two prompts with what the pipeline itself
            samples, and two predictions of a step with each other; a difference above rounding is an error. It costs some
            sixteen denoiser evaluations and is logged as `check_pipeline/max_deviation`.
        updates_per_generation (`int`, *optional*, defaults to `2`):
            Number of parts into which a generation's images are split, with one optimizer update each.
        num_iterations (`int`, *optional*, defaults to `1`):
            Number of passes over a generation.
        gradient_accumulation_steps (`int`, *optional*):
            Follows from the batch sizes. Set it only to check that it is what you expect. `dataclasses.replace` with
            other batch sizes needs it as `None`, to compute it anew.
        epsilon (`float`, *optional*, defaults to `1e-5`):
            Clip range of the probability ratio, whose log is a mean over latent elements.
        beta (`float`, *optional*, defaults to `0.0`):
            Weight of the KL divergence to the reference, which is the model with its adapter switched off (or, in full
            training, a copy of the initial weights).
        adv_clip_max (`float`, *optional*, defaults to `5.0`):
            Advantages are clipped to plus or minus this value.
        reward_weights (`list[float]`, *optional*):
            Weight of each function in `reward_funcs` that is not out of domain. If not set, all are 1. A function of
            weight 0 is only logged, and scores only finished images.
        overlap_rewards (`bool`, *optional*, defaults to `True`):
            Whether the images of one chunk are scored, in a thread, while the next chunk is sampled. The results are the
            same. Set it to `False` for rewards that need the GPU to themselves, or the main thread.
        reward_timeout (`float`, *optional*):
            Seconds that one call of a reward function may take. If not set, any time.
        reward_retries (`int`, *optional*, defaults to `0`):
            How many times a call that failed is repeated, after 1, 2, 4, ... seconds (at most 60).
        reward_on_error (`str`, *optional*, defaults to `"raise"`):
            What follows after the last try: `"raise"` ends the training, after a checkpoint and with the sampled images
            on disk, so that a resumed run does not sample them again; with `"none"` the function does not apply to these
            images, which are counted (`rewards/<name>/failed`).
        out_of_domain_rewards (`list[str]`, *optional*):
            Rewards to watch for over-optimisation: names of built-in ones, or of functions in `reward_funcs`. They are
            scored at each evaluation, and never trained on ([`~callbacks.OverOptimizationCallback`] draws them).
        shuffle_dataset (`bool`, *optional*, defaults to `True`):
            Whether to shuffle the prompts in each epoch.
        ema_decay (`float`, *optional*, defaults to `0.9`):
            Decay of the exponential moving average of the trained weights, which evaluation and saving use. `0`
            switches it off.
        ema_update_steps (`int`, *optional*, defaults to `8`):
            Number of updates between two steps of the moving average.
        eval_num_inference_steps (`int`, *optional*, defaults to `40`):
            Number of denoising steps in evaluation.
        eval_guidance_scale (`float`, *optional*):
            Strength of guidance in evaluation. If not set, `guidance_scale`.
        num_images_to_save (`int`, *optional*, defaults to `16`):
            Number of images in the grid that each evaluation leaves in `output_dir/images` and in the trackers.
        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to leave such a grid of training images at every `logging_steps` too, and a table of all images of the
            generation (`output_dir/completions/*.parquet`: prompt, scores, advantages, what reward functions gave to
            `log_extra`). Some rows of it are printed, and it goes to wandb and trackio.
        num_completions_to_print (`int`, *optional*, defaults to `8`):
            Number of rows of this table that `log_completions` prints. If `None`, all.
        log_unique_prompts (`bool`, *optional*, defaults to `False`):
            Whether `log_completions` prints, and sends to the trackers, only one row of each prompt.
        log_completions_hub_repo (`str`, *optional*):
            Data set on the Hub to which `log_completions` uploads its tables, every two minutes and at the end. It is made
            if it is not there; public, unless `hub_private_repo=True`.

    Raises:
        TypeError: if an argument has another type than its annotation.
        ValueError: if an argument is out of its range, or the batch sizes do not divide; the message names the numbers.
    """

    # Defaults that differ from TrainingArguments
    learning_rate: float = 3e-4
    lr_scheduler_type: str = "constant"
    logging_steps: float = 1
    gradient_accumulation_steps: int | None = None
    bf16: bool | None = None
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool | None = False

    # The pipeline
    model_init_kwargs: dict | str | None = None
    pipeline_kwargs: dict | str | None = None
    pipeline_columns: list[str] | None = None
    negative_prompt: str | None = None
    num_inference_steps: int = 10
    guidance_scale: float | None = None

    # Generations and updates
    num_generations: int = 24
    generation_batch_size: int = 1152
    per_device_rollout_batch_size: int = 16
    per_device_decode_batch_size: int | None = None
    offload_text_encoders: bool = False
    check_pipeline: bool = True
    updates_per_generation: int = 2
    num_iterations: int = 1
    shuffle_dataset: bool = True

    # The loss
    epsilon: float = 1e-5
    beta: float = 0.0
    adv_clip_max: float = 5.0
    reward_weights: list[float] | None = None
    overlap_rewards: bool = True
    reward_timeout: float | None = None
    reward_retries: int = 0
    reward_on_error: str = field(default="raise", metadata={"choices": ["raise", "none"]})
    out_of_domain_rewards: list[str] | None = None

    # Moving average, evaluation, images
    ema_decay: float = 0.9
    ema_update_steps: int = 8
    eval_num_inference_steps: int = 40
    eval_guidance_scale: float | None = None
    num_images_to_save: int = 16
    log_completions: bool = False
    num_completions_to_print: int | None = 8
    log_unique_prompts: bool = False
    log_completions_hub_repo: str | None = None

    @property
    def num_trained_steps(self) -> int:
        """Number of stochastic steps K of a trajectory; each is trained."""
        return self.num_inference_steps - 1

    @property
    def num_sweeps(self) -> int:
        """Number of sweeps over the images that one pass over a generation takes, each with updates of its own."""
        return 1

    @property
    def sampling_arguments(self) -> dict[str, Any]:
        """What samples may depend on: all fields but those that say how they are scored."""
        names = [
            name
            for name in self._own_fields()
            if not name.startswith(("reward_", "overlap_", "out_of_domain_", "check_", "log_", "num_completions_"))
        ]
        return {name: getattr(self, name) for name in ("seed", *names)}

    def _validate(self) -> None:
        """Checks what needs no pipeline and no data."""
        positive = ("generation_batch_size", "per_device_train_batch_size", "per_device_rollout_batch_size",
                    "updates_per_generation", "num_iterations", "ema_update_steps", "num_generations",
                    "eval_num_inference_steps", "per_device_decode_batch_size")  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "it must be at least 1")
        self._check("num_inference_steps", self.num_inference_steps >= 2, "it must be at least 2")
        if self.reward_timeout is not None:
            valid = 0 < self.reward_timeout < math.inf
            self._check("reward_timeout", valid, "it must be above 0, in seconds; `None` sets no limit")
        self._check("reward_retries", self.reward_retries >= 0, "it must not be negative")
        self._check("epsilon", self.epsilon > 0, "it must be above 0; 1e-5 (flow) and 1e-4 (diffusion) are usual")
        self._check("beta", 0 <= self.beta < math.inf, "it must not be negative; 0 switches the KL term off")
        self._check("adv_clip_max", self.adv_clip_max > 0, "it must be above 0; 5 is usual")
        self._check("ema_decay", 0 <= self.ema_decay < 1, "it must be in [0, 1); 0 switches the moving average off")
        for name in ("guidance_scale", "eval_guidance_scale"):
            value = getattr(self, name)
            self._check(name, value is None or 0 <= value < math.inf, "it must not be negative; 1 means no guidance")
        count = self.num_completions_to_print
        self._check("num_completions_to_print", count is None or count >= 1, "it must be at least 1, or None for all")
        uploads = self.log_completions_hub_repo is None or self.log_completions
        self._check("log_completions_hub_repo", uploads, "there are tables to upload only with `log_completions=True`")
        if self.reward_weights is not None:
            valid = all(math.isfinite(weight) for weight in self.reward_weights) and any(self.reward_weights)
            self._check("reward_weights", valid, "weights must be finite, and at least one must not be 0")
        for name in ("model_init_kwargs", "pipeline_kwargs"):
            value = getattr(self, name)
            if isinstance(value, str):
                with suppress(json.JSONDecodeError):
                    setattr(self, name, json.loads(value))
            remedy = """it must be a dict, or its JSON such as '{"height": 512}'"""
            self._check(name, isinstance(getattr(self, name), dict | None), remedy)
        own = {"num_inference_steps", "guidance_scale", "negative_prompt"} & set(self.pipeline_kwargs or {})
        self._check("pipeline_kwargs", not own, f"move {sorted(own)} out of it, to the arguments of the same name")

        size, world_size = self.generation_batch_size, int(os.environ.get("WORLD_SIZE", "1"))
        self._check(
            "generation_batch_size",
            size % self.num_generations == 0,
            f"it must be a multiple of `num_generations={self.num_generations}`, for example "
            f"{max(1, round(size / self.num_generations)) * self.num_generations}",
        )
        unit = self.per_device_train_batch_size * world_size * self.updates_per_generation
        self._check(
            "generation_batch_size",
            size % unit == 0,
            f"it must be a multiple of {unit} = `per_device_train_batch_size={self.per_device_train_batch_size}` * "
            f"{world_size} processes * `updates_per_generation={self.updates_per_generation}`, so that each update has "
            "whole micro-batches. Change one of them",
        )
        steps = self.num_trained_steps // self.num_sweeps
        accumulation = size // unit * steps
        self._check(
            "gradient_accumulation_steps",
            self.gradient_accumulation_steps in (None, accumulation),
            f"the batch sizes make it {accumulation} = {size // unit} micro-batches of images * "
            f"{steps} trained steps. Leave it out (in `dataclasses.replace`: set it to `None`), or change "
            "`updates_per_generation`",
        )
        self.gradient_accumulation_steps = accumulation

    def __post_init__(self):
        self._check_types()
        self._check_choices()
        self._validate()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        super().__post_init__()
