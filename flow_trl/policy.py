"""Any diffusers pipeline as a stochastic policy: its own `__call__`, with a stand-in for its scheduler."""

import copy
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from .utils import sample_generator, to_device, to_pil


class PipelineFamily(NamedTuple):
    """
    What [`PipelinePolicy`] must be told about a pipeline class; everything else it asks the pipeline.

    Args:
        outputs (`tuple[str | None, ...]`):
            For each output of `encode_prompt`, the argument of `__call__` that takes it (`None`: it is not passed on).
        guidance (`str`, *optional*, defaults to `"guidance_scale"`):
            Argument of `__call__` that sets the strength of guidance.
        negative_if (`str`, *optional*, defaults to `"guidance_scale"`):
            Argument of `__call__` above 1 of which the pipeline needs an embedding of the negative prompt.
    """

    outputs: tuple[str | None, ...]
    guidance: str = "guidance_scale"
    negative_if: str = "guidance_scale"


PIPELINE_FAMILIES: dict[str, PipelineFamily] = {
    "StableDiffusion3Pipeline": PipelineFamily(
        ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    ),
    "FluxPipeline": PipelineFamily(("prompt_embeds", "pooled_prompt_embeds", None), negative_if="true_cfg_scale"),
    "QwenImagePipeline": PipelineFamily(
        ("prompt_embeds", "prompt_embeds_mask"), guidance="true_cfg_scale", negative_if="true_cfg_scale"
    ),
    "StableDiffusionPipeline": PipelineFamily(("prompt_embeds", "negative_prompt_embeds")),
    "StableDiffusionXLPipeline": PipelineFamily(
        ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    ),
    "WanPipeline": PipelineFamily(("prompt_embeds", "negative_prompt_embeds")),
}

# Arguments of `__call__` that the policy sets itself, or that mean something else in a call of a single step.
_RESERVED = {
    "prompt", "prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3",
    "num_inference_steps", "timesteps", "sigmas", "generator", "latents", "eta",
    "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt", "callback_on_step_end",
    "callback_on_step_end_tensor_inputs", "skip_guidance_layers", "denoising_end",
}  # fmt: skip


class Schedule(NamedTuple):
    """
    The noise levels of one sampling run, as the pipeline sets them.

    Args:
        timesteps (`torch.Tensor` of shape `(T,)`):
            What the denoiser is given at each step.
        sigmas (`torch.Tensor` of shape `(T + 1,)`, float32, on the CPU, *optional*):
            Noise level before each step and after the last, where the scheduler has such.
    """

    timesteps: torch.Tensor
    sigmas: torch.Tensor | None


@dataclass
class Conditioning:
    """
    Everything a pipeline knows of a batch of prompts, selectable by sample.

    Args:
        arguments (`dict[str, Any]`):
            Arguments of the pipeline's `__call__`; tensors and lists have one entry per prompt.

    Example:

    ```python
    >>> conditioning = policy.encode(["a red circle", "a blue square"])
    >>> len(conditioning[[0, 0, 1]])  # any subset or repetition
    3
    ```
    """

    arguments: dict[str, torch.Tensor | list | None]

    def __len__(self) -> int:
        return len(self.arguments["prompt_embeds"])

    def __getitem__(self, index: list[int] | torch.Tensor | slice) -> "Conditioning":
        rows = torch.arange(len(self))[index].tolist()

        def select(value):
            if isinstance(value, torch.Tensor):
                return value[torch.tensor(rows, device=value.device)]
            return [value[row] for row in rows] if isinstance(value, list) else value

        return Conditioning({name: select(value) for name, value in self.arguments.items()})

    def on(self, device: torch.device, rows: list[int]) -> "Conditioning":
        """
        The conditioning of some rows, on a device to which each distinct row goes once.

        Args:
            device (`torch.device`):
                The device.
            rows (`list[int]`):
                n indices of rows, in any order, with or without repetition.

        Returns:
            [`Conditioning`] of length n.
        """
        distinct = list(dict.fromkeys(rows))
        index = [distinct.index(row) for row in rows]
        device_index = to_device(torch.tensor(index), device)

        def move(value):
            if isinstance(value, torch.Tensor):
                return to_device(value, device).index_select(0, device_index)
            if isinstance(value, list):
                value = [to_device(entry, device) if isinstance(entry, torch.Tensor) else entry for entry in value]
                return [value[i] for i in index]
            return value

        return Conditioning({name: move(value) for name, value in self[distinct].arguments.items()})


class Start(NamedTuple):
    """
    Where sampling begins.

    Args:
        latents (`torch.Tensor` of shape `(N, ...)`, float32):
            Initial noise as this pipeline shapes and packs it.
        schedule ([`Schedule`]):
            Timesteps and sigmas with this pipeline's own shift.
        conditioning ([`Conditioning`]):
            The embedded prompts.
    """

    latents: torch.Tensor
    schedule: Schedule
    conditioning: Conditioning


class _StepReached(Exception):
    """The pipeline called `scheduler.step`; what was wanted is in the stand-in."""


class _StandIn:
    """A scheduler for one call: behaves as the real one up to `step`, and keeps what arrives there."""

    def __init__(self, scheduler, schedule: Schedule | None = None, hand_back: torch.Tensor | None = None):
        self._scheduler = copy.deepcopy(scheduler) if schedule is None else scheduler
        self._fixed = schedule is not None
        self._hand_back = hand_back
        if self._fixed:
            self.timesteps, self.sigmas = schedule
            self.init_noise_sigma = 1.0
            self.order = 1

    def __getattr__(self, name):
        return getattr(self._scheduler, name)

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None):
        if not self._fixed:
            given = {"timesteps": timesteps, "sigmas": sigmas, "mu": mu, "num_inference_steps": num_inference_steps}
            given = {name: value for name, value in given.items() if value is not None}
            self._scheduler.set_timesteps(device=device, **given)

    def set_begin_index(self, begin_index=0):
        pass

    def step(self, model_output, timestep, sample, *args, **kwargs):
        self.model_output, self.sample = model_output, sample
        if self._hand_back is None:
            raise _StepReached
        return (self._hand_back,)


class ModuleProxy:
    """
    A module as others see it: its attributes, the forward of another (its DDP wrapper, say), and a training mode that is
    set already.
    """

    def __init__(self, module: torch.nn.Module, forward: Callable):
        self._module, self._forward = module, forward

    def __getattr__(self, name):
        return getattr(self._module, name)

    def __call__(self, *args, **kwargs):
        return self._forward(*args, **kwargs)

    def train(self, mode: bool = True) -> "ModuleProxy":
        return self


def _no_evaluation(*args, **kwargs) -> tuple[torch.Tensor]:
    return (torch.zeros_like(args[0] if args else kwargs["hidden_states"]),)


def _runner_class(pipeline_class: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """The class of pipeline with a device that is known: its own property walks over all modules several times a call."""
    device = property(lambda self: self.__dict__["_policy_device"])
    return type(pipeline_class.__name__, (pipeline_class,), {"_execution_device": device})


class PipelinePolicy:
    r"""
    A diffusers pipeline as the policy of a reinforcement-learning problem.

    No denoising loop is copied: each method runs the pipeline's **own** `__call__` on a shallow copy of the pipeline
    whose scheduler is a stand-in, and takes what it needs when the pipeline calls `scheduler.step`. Guidance, packing,
    shifts, embeddings and decoding are therefore the pipeline's, in sampling and in training alike. (A safety checker, as
    Stable Diffusion 1.x has one, is left out.)

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]):
            Pipeline of a class in `PIPELINE_FAMILIES`, or of a subclass of one. It is never modified.
        guidance_scale (`float`, *optional*):
            Strength of guidance, passed to the pipeline under its own name for it. If not set, the pipeline's default.
        negative_prompt (`str`, *optional*):
            Negative prompt for guidance. If not set, what the pipeline takes by itself (for pipelines that would leave
            guidance out without one: the empty prompt).
        offload_text_encoders (`bool`, *optional*, defaults to `False`):
            Whether the text encoders wait on the CPU except while they encode.
        **call_kwargs:
            Further arguments of the pipeline's `__call__`, for example `height`, `width`, `max_sequence_length`.

    Attributes:
        forward (`Callable`):
            What evaluates the denoiser when gradients are wanted: set it to the wrapped (DDP, FSDP, DeepSpeed) module.
        evaluations (`int`):
            Number of latents for which `predict` was called so far (with classifier-free guidance, one evaluation is
            two passes through the denoiser).

    Raises:
        ValueError: if the pipeline class is unknown (the message says what to add), has two denoisers, or an argument
            in `call_kwargs` is not an argument of its `__call__` or is one that the policy sets itself.

    Example:

    ```python
    >>> policy = PipelinePolicy(pipe, guidance_scale=4.5)
    >>> latents, schedule, conditioning = policy.start(["a red circle"], 10, [torch.Generator().manual_seed(0)])
    >>> for i in range(10):
    ...     velocity = policy.predict(latents, i, conditioning, schedule)
    ...     latents = latents + (schedule.sigmas[i + 1] - schedule.sigmas[i]) * velocity
    >>> image = policy.decode(latents, conditioning)[0]  # what pipe("a red circle", ...) gives, bit for bit
    ```
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        offload_text_encoders: bool = False,
        **call_kwargs: Any,
    ):
        names = [cls.__name__ for cls in type(pipe).__mro__]
        self.family = next((PIPELINE_FAMILIES[name] for name in names if name in PIPELINE_FAMILIES), None)
        if self.family is None:
            raise ValueError(
                f"`pipe` is a `{names[0]}`, which is not one of {sorted(PIPELINE_FAMILIES)}. To add it, say which "
                "argument of its `__call__` takes each output of its `encode_prompt`: "
                f"`flow_trl.policy.PIPELINE_FAMILIES[{names[0]!r}] = PipelineFamily(outputs=('prompt_embeds', ...))`."
            )
        if getattr(pipe, "transformer_2", None) is not None:
            raise ValueError(
                f"`pipe` ({names[0]}) has two denoisers, `transformer` and `transformer_2`; a policy has one. Load it "
                "with `transformer_2=None, boundary_ratio=None`."
            )
        if guidance_scale is not None and self.family.guidance in call_kwargs:
            raise ValueError(
                f"`guidance_scale={guidance_scale}` is what `{names[0]}` calls `{self.family.guidance}`, and "
                f"`{self.family.guidance}={call_kwargs[self.family.guidance]!r}` is given too: leave one of them out."
            )
        self.pipe = pipe
        self.denoiser_name = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
        self.negative_prompt = negative_prompt
        self.offload_text_encoders = offload_text_encoders
        self.call_kwargs = dict(call_kwargs)
        if guidance_scale is not None:
            self.call_kwargs[self.family.guidance] = guidance_scale
        self._runner_class = _runner_class(type(pipe))
        self._call_function = inspect.unwrap(type(pipe).__call__)
        self._call_defaults = {
            name: parameter.default for name, parameter in inspect.signature(self._call_function).parameters.items()
        }
        for name in call_kwargs:
            if name not in self._call_defaults or name in _RESERVED or name.endswith(("_embeds", "_mask")):
                reason = "is set by the policy" if name in self._call_defaults else "is unknown to the pipeline"
                raise ValueError(
                    f"`{name}={call_kwargs[name]!r}` cannot be passed on to `{names[0]}.__call__`: it {reason}. "
                    "Remove it from the pipeline's keyword arguments."
                )
        self.forward = self.denoiser
        self.evaluations = 0

    @property
    def denoiser(self) -> torch.nn.Module:
        """The module that is trained: the pipeline's `transformer` or `unet`."""
        return getattr(self.pipe, self.denoiser_name)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def makes_videos(self) -> bool:
        """Whether samples have more than one frame."""
        return self.call_kwargs.get("num_frames", self._call_defaults.get("num_frames", 1)) != 1

    @property
    def _is_guided(self) -> bool:
        """Whether the pipeline needs an embedding of the negative prompt."""
        name = self.family.negative_if
        return self.call_kwargs.get(name, self._call_defaults[name]) > 1

    def _negative_prompts(self, count: int) -> list[str] | None:
        """Negative prompts as the pipeline takes them; the empty one for those that would leave guidance out."""
        joint = "do_classifier_free_guidance" in inspect.signature(self.pipe.encode_prompt).parameters
        if self.negative_prompt is None and (joint or not self._is_guided):
            return None
        return [self.negative_prompt or ""] * count

    @contextmanager
    def _text_encoders(self):
        """Within this context the text encoders are where they encode."""
        encoders = []
        if self.offload_text_encoders:
            modules = self.pipe.components
            encoders = [
                modules[name] for name in modules if name.startswith("text_encoder") and modules[name] is not None
            ]
        try:
            for encoder in encoders:
                encoder.to(self.device)
            yield
        finally:
            for encoder in encoders:
                encoder.to("cpu")

    def _runner(self, device: torch.device, **attributes: Any) -> DiffusionPipeline:
        runner = copy.copy(self.pipe)
        runner.__class__ = self._runner_class
        runner.__dict__.update(attributes, _policy_device=device)
        return runner

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """
        Embeds prompts with the pipeline's own `encode_prompt`.

        Args:
            prompts (`list[str]`):
                N prompts.

        Returns:
            [`Conditioning`] of length N.
        """
        prompts, runner = list(prompts), self._runner(self.device)
        parameters = inspect.signature(runner.encode_prompt).parameters
        # What some classes require, and what changes the embedding.
        kwargs = {"prompt_2": None, "prompt_3": None, "num_images_per_prompt": 1}
        kwargs |= {
            name: self.call_kwargs.get(name, self._call_defaults[name])
            for name in ("max_sequence_length", "clip_skip")
            if name in self._call_defaults
        }
        kwargs = {name: value for name, value in kwargs.items() if name in parameters}
        joint, negative = "do_classifier_free_guidance" in parameters, self._negative_prompts(len(prompts))
        if joint:
            kwargs.update(do_classifier_free_guidance=self._is_guided, negative_prompt=negative)

        def encode(texts, prefix=""):
            outputs = runner.encode_prompt(prompt=texts, device=self.device, **kwargs)
            named = {prefix + name: value for name, value in zip(self.family.outputs, outputs, strict=True) if name}
            for name, value in named.items():
                embeds = named.get(name.removesuffix("_mask"))
                if value is None and embeds is not None:  # the pipeline's way to say that all tokens count
                    named[name] = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            return named

        with self._text_encoders():
            arguments = encode(prompts)
            if self._is_guided and not joint:
                arguments |= encode(negative, prefix="negative_")
        return Conditioning(arguments)

    def start(
        self,
        prompts: list[str] | Conditioning,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Start:
        """
        Initial latents, schedule and conditioning of a sampling run. The denoiser is not evaluated.

        Args:
            prompts (`list[str]` or [`Conditioning`]):
                N prompts, or what `encode` made of them.
            num_inference_steps (`int`):
                Number T of denoising steps.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the initial noise, as in diffusers: one for all, or one per prompt.

        Returns:
            [`Start`]: latents of shape `(N, ...)`, schedule of T steps, conditioning of length N.
        """
        conditioning = prompts if isinstance(prompts, Conditioning) else self.encode(prompts)
        stand_in = _StandIn(self.pipe.scheduler)
        self._call(
            stand_in, _no_evaluation, conditioning, num_inference_steps=num_inference_steps, generator=generator
        )
        if float(getattr(stand_in, "init_noise_sigma", 1.0)) != 1.0:
            raise ValueError(
                f"`pipe.scheduler` is a {type(self.pipe.scheduler).__name__}, which scales the denoiser's input by the step; "
                "a policy cannot. Set `pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)`."
            )
        sigmas = getattr(stand_in, "sigmas", None)
        sigmas = None if sigmas is None else torch.as_tensor(sigmas).detach().float().cpu()
        timesteps = stand_in.timesteps.to(self.device)
        return Start(stand_in.sample.float(), Schedule(timesteps, sigmas), conditioning)

    def predict(
        self,
        latents: torch.Tensor,
        step_index: int,
        conditioning: Conditioning,
        schedule: Schedule,
        *,
        grad: bool = False,
    ) -> torch.Tensor:
        """
        The model output that reaches the scheduler at one step, guidance included.

        Args:
            latents (`torch.Tensor` of shape `(N, ...)`):
                Latents before the step, all at the same step.
            step_index (`int`):
                Index of the step, from 0 to T - 1.
            conditioning ([`Conditioning`]):
                Conditioning of length N.
            schedule ([`Schedule`]):
                The schedule that `start` gave.
            grad (`bool`, *optional*, defaults to `False`):
                Whether to record gradients, and to evaluate the denoiser through `forward`.

        Returns:
            `torch.Tensor` of shape `(N, ...)`, float32: velocity of a flow model, or noise (or v) of a diffusion model.
        """
        sigmas = None if schedule.sigmas is None else schedule.sigmas[step_index : step_index + 2]
        stand_in = _StandIn(self.pipe.scheduler, Schedule(schedule.timesteps[step_index : step_index + 1], sigmas))
        self._call(
            stand_in, self.forward if grad else self.denoiser, conditioning, grad=grad, num_inference_steps=1,
            latents=latents,
        )  # fmt: skip
        self.evaluations += len(latents)
        return stand_in.model_output.float()

    def decode(
        self, latents: torch.Tensor, conditioning: Conditioning, output_type: str = "pil"
    ) -> list | torch.Tensor:
        """
        Images of final latents, un-packed, scaled and decoded by the pipeline. The denoiser is not evaluated.

        Args:
            latents (`torch.Tensor` of shape `(N, ...)`):
                Latents after the last step.
            conditioning ([`Conditioning`]):
                Conditioning of length N (it fixes the size of the batch).
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"uint8"`, or as in diffusers.

        Returns:
            `list[PIL.Image.Image]` of length N (for `"pil"`), or uint8 `torch.Tensor` of shape `(N, H, W, 3)` on the CPU
            (for `"uint8"`); for videos of more than one frame, a list of N lists, or `(N, frames, H, W, 3)`.
        """
        vae = getattr(self.pipe, "vae", None)
        schedule = Schedule(torch.zeros(1, device=self.device), torch.zeros(2))
        stand_in = _StandIn(
            self.pipe.scheduler,
            schedule,
            hand_back=latents.to(vae.device, vae.dtype) if vae else latents.to(self.device),
        )
        as_bytes = output_type in ("pil", "uint8")
        output = self._call(
            stand_in,
            _no_evaluation,
            conditioning,
            num_inference_steps=1,
            latents=latents,
            output_type="pt" if as_bytes else output_type,
        )[0]
        if not as_bytes:
            return output
        # As `VaeImageProcessor` does it, but before the pixels leave the GPU.
        pixels = (output.float() * 255).round().to(torch.uint8).movedim(-3, -1).cpu()
        if pixels.ndim == 5 and pixels.shape[1] == 1:
            pixels = pixels.squeeze(1)
        return pixels if output_type == "uint8" else to_pil(pixels)

    @torch.no_grad()
    def check(
        self,
        prompts: list[str],
        num_inference_steps: int,
        ode_step: Callable[..., torch.Tensor],
    ) -> float:
        """
        Compares samples of the policy with those of the pipeline itself, and two predictions of a step with each other.

        Args:
            prompts (`list[str]`):
                Prompts, of which the first two distinct ones are taken.
            num_inference_steps (`int`):
                Number of denoising steps; costs twice as many evaluations, and two more.
            ode_step (`Callable`):
                Deterministic step, as in [`~flow_trl.rollout.rollout`].

        Returns:
            `float`: largest difference between final latents, in units of the pipeline's standard deviation.

        Raises:
            ValueError: if there is a difference above rounding.
        """
        prompts, before = list(dict.fromkeys(prompts))[:2], self.evaluations

        def generators() -> list[torch.Generator]:
            return [sample_generator("check", index) for index in range(len(prompts))]

        latents, schedule, conditioning = self.start(prompts, num_inference_steps, generators())
        twice = [self.predict(latents, 0, conditioning, schedule) for _ in range(2)]
        name = type(self.pipe).__name__
        exact = next(self.denoiser.parameters()).dtype == torch.float32
        tolerance = 1e-3 if exact else 0.1
        difference = ((twice[0] - twice[1]).abs().max() / twice[0].std()).item()
        if not difference <= tolerance:
            raise ValueError(
                f"`model` ({name}) predicts another velocity or noise each time it is asked: the same step of the same latents "
                f"differs by {difference:.3g} of its standard deviation. Something in its call is random (dropout, or a "
                "condition that is encoded with noise): training would follow that noise. Put it into evaluation mode, or give "
                "it conditions that are encoded without noise."
            )
        for step in range(num_inference_steps):
            output = self.predict(latents, step, conditioning, schedule)
            latents = ode_step(output, latents, step, step + 1, schedule)
        self.evaluations = before

        scheduler = copy.deepcopy(self.pipe.scheduler)
        attributes = {"safety_checker": None, "_progress_bar_config": {"disable": True}}
        runner = self._runner(self.device, scheduler=scheduler, **attributes)
        negative = self._negative_prompts(len(prompts))
        with self._text_encoders():
            expected = runner(
                prompt=prompts, negative_prompt=negative, num_inference_steps=num_inference_steps, generator=generators(),
                output_type="latent", **self.call_kwargs,
            )[0].float()  # fmt: skip
        difference = math.inf
        if latents.shape == expected.shape:
            difference = ((latents - expected).abs().max() / expected.std()).item()
        if not difference <= tolerance:
            raise ValueError(
                f"`model` ({name}) samples other latents than the policy that would be trained: after {num_inference_steps} "
                f"steps they differ by {difference:.3g} of their standard deviation, or in shape ({tuple(expected.shape)} and "
                f"{tuple(latents.shape)}). Its class does something in its loop or its encoding of prompts that flow_trl does "
                "not follow: please report it, with the class and the arguments. `check_pipeline=False` trains all the same."
            )
        return difference

    def _call(self, stand_in: _StandIn, forward: Callable, conditioning: Conditioning, grad: bool = False, **kwargs):
        device = self.device
        runner = self._runner(
            device,
            scheduler=stand_in,
            safety_checker=None,  # it would black out what the policy made, noisy latents above all
            _progress_bar_config={"disable": True},
            **{self.denoiser_name: ModuleProxy(self.denoiser, forward)},
        )
        if kwargs.get("latents") is not None:
            kwargs["latents"] = kwargs["latents"].to(device)
        embeddings = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in conditioning.arguments.items()
        }
        with torch.set_grad_enabled(grad):
            try:
                return self._call_function(runner, **embeddings, **self.call_kwargs, **kwargs, return_dict=False)
            except _StepReached:
                return None


class ReferencePolicy:
    """
    A policy as it was before training: the same denoiser with its adapter switched off, or a copy of its weights.

    Args:
        policy ([`PipelinePolicy`]):
            The policy, before training.
        is_lora (`bool`):
            Whether an adapter is trained.
    """

    def __init__(self, policy: PipelinePolicy, is_lora: bool):
        self._policy, self._adapters = copy.copy(policy), []
        if is_lora:
            self._adapters = [layer for layer in policy.denoiser.modules() if isinstance(layer, BaseTunerLayer)]
            return
        self._policy.pipe = copy.copy(policy.pipe)
        self._policy.pipe.__dict__[policy.denoiser_name] = copy.deepcopy(policy.denoiser).requires_grad_(False)

    def predict(
        self, latents: torch.Tensor, step_index: int, conditioning: Conditioning, schedule: Schedule
    ) -> torch.Tensor:
        """As [`PipelinePolicy.predict`], without gradients."""
        for layer in self._adapters:  # the denoiser's own switch also walks over what needs gradients
            layer._disable_adapters = True
        try:
            return self._policy.predict(latents, step_index, conditioning, schedule)
        finally:
            for layer in self._adapters:
                layer._disable_adapters = False


class PromptCache:
    """
    Embeds each prompt once. Embeddings wait on the CPU; the ones that were not used for the longest time go first.

    What a prompt's embedding is does not depend on what was asked before: the prompts that are missing are embedded in
    batches as large as the number of distinct prompts in the call (at most 64), filled up, or one by one where the length
    of an embedding depends on its batch.

    Args:
        policy ([`PipelinePolicy`]):
            The policy whose `encode` is used.
        max_bytes (`int`, *optional*, defaults to 2 GiB):
            Size from which on embeddings are dropped. Those of one call are always kept.

    Example:

    ```python
    >>> cache = PromptCache(policy)
    >>> conditioning = cache.encode(["a red circle", "a blue square"])  # on the CPU
    >>> latents = policy.start(conditioning.on(policy.device, [0, 0, 1]), 10).latents
    ```
    """

    def __init__(self, policy: PipelinePolicy, max_bytes: int = 2 * 2**30):
        self.policy, self.max_bytes = policy, max_bytes
        self._rows: OrderedDict[str, Conditioning] = OrderedDict()

    def encode(self, prompts: list[str]) -> Conditioning:
        """
        Conditioning of prompts.

        Args:
            prompts (`list[str]`):
                N prompts.

        Returns:
            [`Conditioning`] of length N, on the CPU.
        """
        distinct = list(dict.fromkeys(prompts))
        missing = [prompt for prompt in distinct if prompt not in self._rows]
        masked = any(name and name.endswith("_mask") for name in self.policy.family.outputs)
        size = 1 if masked else min(len(distinct), 64)
        for first in range(0, len(missing), size):
            part = missing[first : first + size]
            embedded = self.policy.encode(part + part[-1:] * (size - len(part)))
            for i, prompt in enumerate(part):
                row = embedded[[i]].arguments
                self._rows[prompt] = Conditioning(
                    {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in row.items()}
                )
        for prompt in distinct:
            self._rows.move_to_end(prompt)
        rows = [self._rows[prompt].arguments for prompt in prompts]
        total = sum(map(_num_bytes, self._rows.values()))
        while total > self.max_bytes and len(self._rows) > len(distinct):
            total -= _num_bytes(self._rows.popitem(last=False)[1])
        return Conditioning({name: _joined([row[name] for row in rows]) for name in rows[0]})


def _num_bytes(conditioning: Conditioning) -> int:
    return sum(value.nbytes for value in conditioning.arguments.values() if isinstance(value, torch.Tensor))


def _joined(values: list) -> torch.Tensor | list | None:
    """Rows of one argument as one; where lengths differ, zeros follow (and a mask says so)."""
    if isinstance(values[0], list):
        return [entry for value in values for entry in value]
    if not isinstance(values[0], torch.Tensor):
        return values[0]
    if len({value.shape for value in values}) > 1:
        length = max(value.shape[1] for value in values)
        values = [F.pad(v, [0, 0] * (v.ndim - 2) + [0, length - v.shape[1]]) for v in values]
    return torch.cat(values)
