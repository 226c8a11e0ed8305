"""Arguments that all trainers of diffusers pipelines share."""

import inspect
import json
import math
import numbers
import os
from contextlib import suppress
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Union, get_args, get_origin

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is what an annotation such as `list[float] | None` says; whole numbers are floats too."""
    if get_origin(annotation) is list:
        return isinstance(value, list | tuple) and all(_fits(entry, get_args(annotation)[0]) for entry in value)
    if get_origin(annotation) in (Union, UnionType):
        return any(_fits(value, choice) for choice in get_args(annotation))
    if annotation in (int, float):
        number = numbers.Integral if annotation is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return not isinstance(annotation, type) or isinstance(value, annotation)


@dataclass
class DiffusionConfig(TrainingArguments):
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
            Follows from the arguments above. Set it only to check that it is what you expect. `dataclasses.replace`
            with other batch sizes needs it as `None`, to compute it anew.
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
            Number of rows of that table that are printed. If `None`, all.
        log_unique_prompts (`bool`, *optional*, defaults to `False`):
            Whether only one row of each prompt is printed and goes to the trackers.
        log_completions_hub_repo (`str`, *optional*):
            Data set on the Hub to which the tables are uploaded, every two minutes and at the end. It is made if it is not
            there; public, unless `hub_private_repo=True`.

    Raises:
        TypeError: if an argument has another type than its annotation.
        ValueError: if an argument is out of its range, or the batch sizes do not divide; the message names the numbers.
    """

    # Defaults that differ from TrainingArguments
    learning_rate: float = field(default=3e-4, metadata={"help": "The initial learning rate."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning-rate schedule."})
    logging_steps: float = field(default=1, metadata={"help": "Log every X updates."})
    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "Follows from the batch sizes; set it only to check it."}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "Whether to train in bfloat16. If not set, `True` on GPUs that have it."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether a loss that is not finite is left out of the logs."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Not used: every column reaches the reward functions."}
    )

    # The pipeline
    model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments for `DiffusionPipeline.from_pretrained`."}
    )
    pipeline_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments for each call of the pipeline, such as height and width."}
    )
    pipeline_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns that the pipeline is given with each prompt, such as image."}
    )
    negative_prompt: str | None = field(default=None, metadata={"help": "Negative prompt for guidance."})
    num_inference_steps: int = field(default=10, metadata={"help": "Number of denoising steps in training."})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Strength of guidance. If not set, the pipeline's default."}
    )

    # Generations and updates
    num_generations: int = field(default=24, metadata={"help": "Number of images per prompt in a generation."})
    generation_batch_size: int = field(
        default=1152, metadata={"help": "Number of images in a generation, over all processes."}
    )
    per_device_rollout_batch_size: int = field(
        default=16, metadata={"help": "Number of images that are sampled together, with all their completions."}
    )
    per_device_decode_batch_size: int | None = field(
        default=None, metadata={"help": "Largest number of latents in one call of the decoder."}
    )
    offload_text_encoders: bool = field(
        default=False, metadata={"help": "Whether the text encoders wait on the CPU except while they encode."}
    )
    check_pipeline: bool = field(
        default=True, metadata={"help": "Whether to compare a short rollout with the pipeline's own samples first."}
    )
    updates_per_generation: int = field(default=2, metadata={"help": "Number of updates per pass over a generation."})
    num_iterations: int = field(default=1, metadata={"help": "Number of passes over a generation."})
    shuffle_dataset: bool = field(default=True, metadata={"help": "Whether to shuffle the prompts in each epoch."})

    # The loss
    epsilon: float = field(default=1e-5, metadata={"help": "Clip range of the probability ratio."})
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL divergence to the reference."})
    adv_clip_max: float = field(default=5.0, metadata={"help": "Advantages are clipped to plus or minus this."})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function; 0 only logs it. If not set, all are 1."}
    )
    overlap_rewards: bool = field(
        default=True, metadata={"help": "Whether to score images in a thread while the next ones are sampled."}
    )
    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that one call of a reward function may take."}
    )
    reward_retries: int = field(default=0, metadata={"help": "How many times a failed reward call is repeated."})
    reward_on_error: str = field(
        default="raise", metadata={"help": "What follows after the last try.", "choices": ["raise", "none"]}
    )
    out_of_domain_rewards: list[str] | None = field(
        default=None, metadata={"help": "Names of rewards that are scored at each evaluation and never trained on."}
    )

    # Moving average, evaluation, images
    ema_decay: float = field(default=0.9, metadata={"help": "Decay of the moving average of the weights; 0: none."})
    ema_update_steps: int = field(default=8, metadata={"help": "Updates between two steps of the moving average."})
    eval_num_inference_steps: int = field(default=40, metadata={"help": "Denoising steps in evaluation."})
    eval_guidance_scale: float | None = field(
        default=None, metadata={"help": "Strength of guidance in evaluation. If not set, `guidance_scale`."}
    )
    num_images_to_save: int = field(default=16, metadata={"help": "Number of images in a saved grid."})
    log_completions: bool = field(
        default=False,
        metadata={"help": "Whether to save training images, and print some rewards, at every `logging_steps`."},
    )
    num_completions_to_print: int | None = field(
        default=8, metadata={"help": "Number of images whose rewards `log_completions` prints. If None, all."}
    )
    log_unique_prompts: bool = field(
        default=False, metadata={"help": "Whether `log_completions` shows only one image of each prompt."}
    )
    log_completions_hub_repo: str | None = field(
        default=None, metadata={"help": "Data set on the Hub to which `log_completions` uploads its tables."}
    )

    @property
    def num_trained_steps(self) -> int:
        """Number of stochastic steps K of a trajectory; each is trained."""
        return self.num_inference_steps - 1

    @property
    def num_sweeps(self) -> int:
        """Number of sweeps over the images that one pass over a generation takes, each with updates of its own."""
        return 1

    @classmethod
    def _own_fields(cls) -> dict[str, Any]:
        """The fields that [`~transformers.TrainingArguments`] has not, or has with other defaults: their annotations."""
        classes = [base for base in cls.__mro__ if issubclass(base, DiffusionConfig)]
        return {
            name: annotation
            for base in reversed(classes)
            for name, annotation in inspect.get_annotations(base, eval_str=True).items()
        }

    @property
    def sampling_arguments(self) -> dict[str, Any]:
        """What samples may depend on: all fields but those that say how they are scored."""
        names = [
            name
            for name in self._own_fields()
            if not name.startswith(("reward_", "overlap_", "out_of_domain_", "check_", "log_", "num_completions_"))
        ]
        return {name: getattr(self, name) for name in ("seed", *names)}

    def _check(self, name: str, condition: bool, remedy: str) -> None:
        if not condition:
            raise ValueError(f"`{name}={getattr(self, name)!r}` does not work: {remedy}.")

    def _check_types(self) -> None:
        for name, annotation in self._own_fields().items():
            value, expected = getattr(self, name), inspect.formatannotation(annotation)
            if not _fits(value, annotation):
                raise TypeError(f"`{name}={value!r}` is a {type(value).__name__}: it must be `{expected}`.")

    def _validate(self) -> None:
        """Checks what needs no pipeline and no data."""
        positive = ("generation_batch_size", "per_device_train_batch_size", "per_device_rollout_batch_size",
                    "updates_per_generation", "num_iterations", "ema_update_steps", "num_generations",
                    "eval_num_inference_steps")  # fmt: skip
        for name in positive:
            self._check(name, getattr(self, name) >= 1, "it must be at least 1")
        self._check("num_inference_steps", self.num_inference_steps >= 2, "it must be at least 2")
        if self.per_device_decode_batch_size is not None:
            self._check(
                "per_device_decode_batch_size", self.per_device_decode_batch_size >= 1, "it must be at least 1"
            )
        if self.reward_timeout is not None:
            valid = 0 < self.reward_timeout < math.inf
            self._check("reward_timeout", valid, "it must be above 0, in seconds; `None` sets no limit")
        self._check("reward_retries", self.reward_retries >= 0, "it must not be negative")
        self._check("reward_on_error", self.reward_on_error in ("raise", "none"), "choose 'raise' or 'none'")
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
        self._validate()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        super().__post_init__()
