"""Any diffusers pipeline as a stochastic policy: its own `__call__`, with a stand-in for its scheduler."""

import copy
import functools
import inspect
import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.utils import load_image
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch.utils._pytree import tree_leaves, tree_map_only

from .conditioning import Batch, Conditioning, NoRows, Row, find_rows, fits, has_padding, split_rows, with_masks
from .stand_ins import (
    Encoded,
    Experts,
    ModuleProxy,
    Schedule,
    StandIn,
    StepReached,
    mode_of,
    no_control,
    no_evaluation,
    runner_class,
)
from .utils import sample_generator, to_pil


logger = logging.getLogger(__name__)

# Arguments of `__call__` that the policy sets itself.
_RESERVED = {
    "prompt", "prompt_2", "prompt_3", "prompt_4", "negative_prompt_2", "negative_prompt_3", "negative_prompt_4",
    "num_inference_steps", "timesteps", "sigmas", "generator", "latents", "eta",
    "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt", "callback_on_step_end",
    "callback_on_step_end_tensor_inputs", "callback", "callback_steps", "denoising_end", "audio_latents",
}  # fmt: skip

DENOISERS = ("transformer", "transformer_2", "unet")

# What a pipeline computes of prompts and images before its loop: recorded in `encode`, given back afterwards.
_RECORDED = re.compile(r"_?(encode|prepare)_(?!extra_step_kwargs)\w+")
_RECORDED_OF_PROCESSORS = re.compile("preprocess|preprocess_video|resize|resize_and_crop_tensor")

# Arguments of `__call__` that a data set may have a column for, one entry per prompt.
COLUMNS = ("image", "control_image", "mask_image", "last_image", "ip_adapter_image")


class Start(NamedTuple):
    """
    Where sampling begins.

    Args:
        latents (`torch.Tensor` of shape `(N, ...)`, float32): initial noise as this pipeline shapes and packs it.
        schedule ([`Schedule`]): timesteps and sigmas with this pipeline's own shift.
        conditioning ([`Conditioning`]): what the pipeline computed of the prompts.
    """

    latents: torch.Tensor
    schedule: Schedule
    conditioning: Conditioning


@contextmanager
def _quiet():
    """Within this context diffusers and transformers log errors only."""
    loggers = [library.utils.logging for library in (diffusers, transformers)]
    before = [library.get_verbosity() for library in loggers]
    for library in loggers:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity in zip(loggers, before, strict=True):
            library.set_verbosity(verbosity)


def _inverted(image: Image.Image) -> Image.Image:
    return Image.eval(image, lambda channel: 255 - channel)


class _Found(NamedTuple):
    """
    How what a pipeline computes depends on the prompts of a call.

    Args:
        layout (`Any`): see [`~conditioning.find_layout`]; `None` if a call can have one prompt only.
        names (`tuple[str, ...]`): the methods that compute something.
        masked (`bool`): whether masks that are missing are masks of ones.
        in_lists (`bool`): whether a call takes a list of images, one for each prompt.
        lengths_differ (`bool`): whether what is computed of two prompts differs in length.
    """

    layout: Any
    names: tuple[str, ...]
    masked: bool
    in_lists: bool
    lengths_differ: bool


class PipelinePolicy:
    r"""
    A diffusers pipeline as the policy of a reinforcement-learning problem.

    No denoising loop is copied: each method runs the pipeline's **own** `__call__` on a shallow copy of the pipeline
    whose scheduler is a stand-in, and takes what it needs when the pipeline calls `scheduler.step`. Guidance, packing,
    shifts, embeddings and decoding are therefore the pipeline's, in sampling and in training alike. What its methods
    compute of prompts and images before the loop is recorded once (`encode`) and given back in later calls. (A safety
    checker, as Stable Diffusion 1.x has one, is left out, and conditions that a VAE encodes are its mode, not a sample.)

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]):
            Pipeline of any class whose loop calls `scheduler.step` once a step. It is never modified.
        guidance_scale (`float`, *optional*):
            Strength of classifier-free guidance, passed to the pipeline under its own name for it. If not set, the
            pipeline's default.
        negative_prompt (`str`, *optional*):
            Negative prompt for guidance. If not set, what the pipeline takes by itself (for pipelines that would leave
            guidance out without one: the empty prompt).
        offload_text_encoders (`bool`, *optional*, defaults to `False`):
            Whether the text encoders wait on the CPU except while they encode.
        **call_kwargs:
            Further arguments of the pipeline's `__call__`, for example `height`, `width`, `max_sequence_length`,
            `strength`.

    Attributes:
        forward (`Callable`):
            What evaluates the denoiser when gradients are wanted: set it to the wrapped (DDP, FSDP, DeepSpeed) module.
        evaluations (`int`):
            Number of latents for which `predict` was called so far (with classifier-free guidance, one evaluation is
            two passes through the denoiser).

    Raises:
        ValueError: if the pipeline has no denoiser, or an argument in `call_kwargs` is not an argument of its
            `__call__` or is one that the policy sets itself.

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
        self.pipe = pipe
        self.denoiser_names = [part for part in DENOISERS if getattr(pipe, part, None) is not None]
        self._call_function = inspect.unwrap(type(pipe).__call__)
        parameters = inspect.signature(self._call_function).parameters
        self._call_defaults = {key: parameter.default for key, parameter in parameters.items()}
        self._check_pipe()
        self._experts = Experts(self.denoisers) if len(self.denoiser_names) > 1 else None
        own = "guidance_scale" if self._call_defaults.get("guidance_scale") is not None else "true_cfg_scale"
        self._check_arguments(guidance_scale, own, negative_prompt, call_kwargs)
        self.negative_prompt = negative_prompt
        self.offload_text_encoders = offload_text_encoders
        self.call_kwargs = dict(call_kwargs)
        if guidance_scale is not None:
            self.call_kwargs[own] = guidance_scale
        self._runner_class = runner_class(type(pipe))
        self._recorded = list(filter(_RECORDED.fullmatch, dir(type(pipe))))
        self._recorded_of_processors = {
            part: list(filter(_RECORDED_OF_PROCESSORS.fullmatch, dir(processor)))
            for part, processor in vars(pipe).items()
            if part.endswith("_processor")
        }
        self._found: _Found | None = None
        self._asked: dict[int, int] = {}  # `num_inference_steps` of the call that runs so many steps
        self.forward = self.denoiser
        self.evaluations = 0

    def _check_pipe(self) -> None:
        name = type(self.pipe).__name__
        if not self.denoiser_names or getattr(self.pipe, "scheduler", None) is None:
            raise ValueError(
                f"`pipe` ({name}) has no `transformer` or `unet` and `scheduler`: a policy is a pipeline that denoises latents."
            )
        needed = ("prompt", "num_inference_steps", "generator", "output_type", "return_dict")
        missing = [key for key in needed if key not in self._call_defaults]
        if missing:
            raise ValueError(
                f"`pipe` ({name}) cannot be a policy: its `__call__` does not take {missing}. Use a pipeline from a text to "
                "images or videos, with diffusers' usual arguments."
            )
        for part in ("guider", "ocr_guider"):
            if getattr(getattr(self.pipe, part, None), "adaptive_projected_guidance_momentum", None):
                raise ValueError(
                    f"`pipe.{part}` has a momentum, so its guidance depends on the latents of earlier steps; a policy's cannot. "
                    "Set its `adaptive_projected_guidance_momentum=None`."
                )

    def _check_arguments(
        self, guidance_scale: float | None, own: str, negative_prompt: str | None, call_kwargs: dict[str, Any]
    ) -> None:
        name = type(self.pipe).__name__
        if guidance_scale is not None and own not in self._call_defaults:
            raise ValueError(
                f"`guidance_scale={guidance_scale}` is not an argument of `{name}.__call__`: leave it out, and set what the "
                "pipeline has instead in its keyword arguments or its components."
            )
        if guidance_scale is not None and own in call_kwargs:
            raise ValueError(
                f"`guidance_scale={guidance_scale}` is what `{name}` calls `{own}`, and `{own}={call_kwargs[own]!r}` is given "
                "too: leave one of them out."
            )
        if negative_prompt is not None and "negative_prompt" not in self._call_defaults:
            raise ValueError(
                f"`negative_prompt={negative_prompt!r}` is not an argument of `{name}.__call__`: leave it out."
            )
        for key, value in call_kwargs.items():
            if key not in self._call_defaults or key in _RESERVED or key.endswith(("_embeds", "_mask")):
                reason = "is set by the policy" if key in self._call_defaults else "is unknown to the pipeline"
                raise ValueError(
                    f"`{key}={value!r}` cannot be passed on to `{name}.__call__`: it {reason}. "
                    "Remove it from the pipeline's keyword arguments."
                )

    @property
    def denoisers(self) -> dict[str, torch.nn.Module]:
        """The pipeline's denoisers by name: its `transformer` or `unet`, and `transformer_2` where it has one."""
        return {name: getattr(self.pipe, name) for name in self.denoiser_names}

    @property
    def denoiser(self) -> torch.nn.Module:
        """The module that is trained: the denoiser, or [`Experts`] of two."""
        return self._experts if self._experts is not None else getattr(self.pipe, self.denoiser_names[0])

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def makes_videos(self) -> bool:
        """Whether samples have more than one frame."""
        names = [name for name in ("num_frames", "frames", "video_length") if name in self._call_defaults]
        return any(self.call_kwargs.get(name, self._call_defaults[name]) != 1 for name in names)

    def columns(self, wanted: list[str] | None, names: dict[str, list[str]]) -> list[str]:
        """
        Columns of data sets that the pipeline's `__call__` takes for each prompt, in addition to it.

        Args:
            wanted (`list[str]`, *optional*):
                The columns. If not set, those of `COLUMNS` that the call takes and all data sets have.
            names (`dict[str, list[str]]`):
                Names of the columns of each data set, by what it is called.

        Returns:
            `list[str]`

        Raises:
            ValueError: if one is missing in a data set or is not an argument of the call.
        """
        takes = [name for name in COLUMNS if name in self._call_defaults]
        if wanted is None:
            there = [name for name in takes if any(name in columns for columns in names.values())]
            both = [name for name in there if name in self.call_kwargs]
            if both:
                raise ValueError(
                    f"`{both[0]}` is a column of a data set and an argument in `pipeline_kwargs`: leave one of them out, or set "
                    "`pipeline_columns` to the columns that the pipeline shall be given (`[]`: none)."
                )
            for column in there:
                lacking = [name for name, columns in names.items() if column not in columns]
                if lacking:
                    raise ValueError(
                        f"`{lacking[0]}` has no column `{column}`, which the pipeline is given from another data set: add it, "
                        "or set `pipeline_columns` to the columns that the pipeline shall be given (`[]`: none)."
                    )
            return there
        for column in wanted:
            images = column in COLUMNS or column.endswith(("image", "images", "video"))
            if column not in self._call_defaults or column in self.call_kwargs or not images:
                raise ValueError(
                    f"`pipeline_columns={wanted}`: `{column}` is not an argument of `{type(self.pipe).__name__}.__call__` that "
                    f"can be given for each prompt. Such are {takes}."
                )
            for name, columns in names.items():
                if column not in columns:
                    raise ValueError(
                        f"`pipeline_columns={wanted}`: `{name}` has no column `{column}` but {columns}: add or rename it."
                    )
        return list(wanted)

    def texts(self, prompts: list[str]) -> dict[str, list[str]]:
        """
        The arguments of a call that are texts, each of length N: prompts and, where there are any, negative prompts
        (the empty one for pipelines that would leave guidance out without one).
        """
        true_scale = self.call_kwargs.get("true_cfg_scale", self._call_defaults.get("true_cfg_scale", 0))
        negative = "" if self.negative_prompt is None and true_scale > 1 else self.negative_prompt
        prompts = list(prompts)  # pipelines change what they are given
        return {"prompt": prompts} | ({} if negative is None else {"negative_prompt": [negative] * len(prompts)})

    @contextmanager
    def _text_encoders(self):
        """Within this context the text encoders are where they encode."""
        encoders = [
            module
            for name, module in self.pipe.components.items()
            if self.offload_text_encoders and name.startswith("text_encoder") and module is not None
        ]
        try:
            for encoder in encoders:
                encoder.to(self.device)
            yield
        finally:
            for encoder in encoders:
                encoder.to("cpu")

    def _runner(self, around: Callable[[str, Callable], Callable], scheduler: Any) -> DiffusionPipeline:
        """
        A shallow copy of the pipeline, for one call, whose methods that are recorded are `around(name, method)`; what
        they call are the methods themselves.
        """
        around = _outermost(around)
        runner = copy.copy(self.pipe)
        runner.__class__ = self._runner_class
        attributes = {"scheduler": scheduler, "_policy_device": self.device, "_progress_bar_config": {"disable": True}}
        # A checker would black out what the policy made, noisy latents above all.
        runner.__dict__.update(attributes, safety_checker=None)
        for name in self._recorded:
            runner.__dict__[name] = around(name, getattr(runner, name))
        for part, names in self._recorded_of_processors.items():
            processor = copy.copy(getattr(self.pipe, part))
            for name in names:
                processor.__dict__[name] = around(f"{part}.{name}", getattr(processor, name))
            runner.__dict__[part] = processor
        for part, module in vars(self.pipe).items():
            if part.endswith("guider"):
                runner.__dict__[part] = copy.copy(module)
        vae = getattr(self.pipe, "vae", None)
        if hasattr(vae, "encode"):
            runner.__dict__["vae"] = copied = copy.copy(vae)
            encode = around("vae.encode", lambda *args, **kwargs: mode_of(vae.encode(*args, **kwargs)))
            copied.__dict__["encode"] = lambda *args, **kwargs: Encoded(encode(*args, **kwargs))
        return runner

    def _record(self, prompts: list[str], given: dict[str, Any]) -> tuple[tuple[str, ...], list]:
        """What the pipeline's methods return before the first step: their names, and their outputs."""
        names, outputs = [], []

        def around(name: str, method: Callable) -> Callable:
            def recorded(*args, **kwargs):
                output = method(*args, **kwargs)
                if _tensors(output):
                    names.append(name)
                    if name == "prepare_latents":  # of its latents the data type and the device are wanted
                        outputs.append(_with_latents(output, _latents_of(output).new_empty(0)))
                    else:
                        outputs.append(output)
                return output

            return recorded

        def reached(*args):
            raise StepReached

        generator = sample_generator("conditions")
        runner = self._runner(around, StandIn.of(self.pipe.scheduler, reached))
        self._call(runner, prompts, given, num_inference_steps=self.steps_asked(2), generator=generator)
        return tuple(names), outputs

    def _find_rows(self, given: dict[str, Any]) -> None:
        """Finds out how what is recorded depends on the prompts, from a short one, a longer one, and both in one call."""
        prompt, longer, error = "a", "a" + 20 * " a", None
        with _quiet():  # nobody gave these prompts
            names, first = self._record([prompt], given)
            singles = bool(given) and not any(isinstance(value, list) for value in given.values())
            other = tree_map_only(Image.Image, _inverted, given)
            for in_lists in (True, False) if singles else (False,):  # whether a call may have an image for each prompt
                together = {name: [value, other[name]] for name, value in given.items()} if in_lists else given
                try:
                    second = self._record([longer], other if in_lists else given)[1]
                    both_names, both = self._record([prompt, longer], together)
                    if both_names != names:
                        raise NoRows("its methods are called in another order")
                    layout, masked = find_rows(first, second, both)
                except Exception as caught:  # a class that takes one prompt raises whatever it comes upon
                    error = caught
                else:
                    shapes = [[tuple(v.shape) for v in _tensors(values)] for values in (first, second)]
                    self._found = _Found(layout, names, masked, in_lists, shapes[0] != shapes[1])
                    return
        logger.warning(
            "%s cannot make a batch of different prompts (%s): its denoiser is evaluated for one sample at a time.",
            type(self.pipe).__name__, error,
        )  # fmt: skip
        self._found = _Found(None, names, False, False, False)

    def encodes_in_batches(self) -> bool:
        """Whether what is computed of a prompt does not depend on the others in its call."""
        if self._found is None:
            with torch.no_grad(), self._text_encoders():
                self._find_rows({})
        return self._found.layout is not None and not self._found.lengths_differ

    @torch.no_grad()
    def encode(self, prompts: list[str], **columns: list) -> Conditioning:
        """
        What the pipeline computes of prompts before it samples, by its own methods (`encode_prompt` and the like).

        Args:
            prompts (`list[str]`):
                N prompts.
            **columns (`list`):
                N entries for further arguments of the pipeline's `__call__`, such as `image`: each a `PIL.Image.Image`, a
                path, or a list of them.

        Returns:
            [`Conditioning`] of length N.
        """
        prompts = list(prompts)
        given = [
            tree_map_only((str, Image.Image), load_image, {name: column[i] for name, column in columns.items()})
            for i in range(len(prompts))
        ]
        with self._text_encoders():
            return Conditioning(self._encoded(prompts, given))

    def _encoded(self, prompts: list[str], given: list[dict[str, Any]]) -> list[Row]:
        if self._found is None:
            self._find_rows(given[0])
        found, calls, rows = self._found, [(prompts, {})], []
        if any(given) or found.layout is None or (found.lengths_differ and not has_padding(found.layout)):
            calls = [([prompt], values) for prompt, values in zip(prompts, given, strict=True)]
        while calls:
            texts, values = calls.pop(0)
            names, outputs = self._record(texts, values)
            if found.masked:
                outputs = [with_masks(output) for output in outputs]
            known = found.layout is not None and names == found.names and fits(found.layout, outputs)
            if known or len(texts) == 1:
                rows += split_rows(found.layout if known else None, names, outputs, texts, values, found.in_lists)
            else:
                calls = [([text], {}) for text in texts]
        return rows

    def _run(
        self,
        calls: list[Batch],
        scheduler: Callable[[list[int]], StandIn],
        latents: torch.Tensor | None = None,
        *,
        evaluates: Callable[[], bool] = lambda: False,
        grad: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """What the pipeline returns for each batch, with what was recorded given back."""
        outputs = []
        for batch in calls:
            index, stand_in = batch.index, scheduler(batch.index)
            given = None if latents is None else latents[index]
            runner = self._runner(_giving_back(batch.recorded, stand_in, given), stand_in)
            chosen = {
                name: [value[i] for i in index] if isinstance(value, list) else value for name, value in kwargs.items()
            }
            outputs.append(self._call(runner, batch.prompts, batch.given, evaluates, grad, **chosen))
        return outputs

    @staticmethod
    def _calls_from_noise(conditioning: Conditioning) -> list[Batch]:
        """The calls that begin with noise: one for each row with images of which a call can have one."""
        if all(row.in_list or not row.given for row in conditioning.rows):
            return conditioning.batches
        rows = [Conditioning([row]).batches[0] for row in conditioning.rows]
        return [row._replace(index=[place]) for place, row in enumerate(rows)]

    def _call(
        self,
        runner: DiffusionPipeline,
        prompts: list[str],
        given: dict[str, Any],
        evaluates: Callable[[], bool] = lambda: False,
        grad: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The output of a call, `None` if it ended at a step. Modules are evaluated in it while `evaluates()`."""

        def switched(module: Callable, instead: Callable) -> Callable:
            return lambda *args, **kwargs: (module if evaluates() else instead)(*args, **kwargs)

        forward = self.forward if grad else self.denoiser
        for name, denoiser in self.denoisers.items():
            expert = forward if self._experts is None else functools.partial(forward, name)
            runner.__dict__[name] = ModuleProxy(denoiser, switched(expert, no_evaluation))
        controlnet = getattr(self.pipe, "controlnet", None)
        if controlnet is not None:
            runner.__dict__["controlnet"] = copied = copy.copy(controlnet)
            copied.__dict__["forward"] = switched(controlnet, no_control)
        with torch.set_grad_enabled(grad):
            try:
                return self._call_function(
                    runner, **self.texts(prompts), **given, **self.call_kwargs, **kwargs, return_dict=False
                )
            except StepReached:
                return None

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
                Number T of denoising steps that are run (a pipeline with `strength=0.5` is asked for twice as many).
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the initial noise, as in diffusers: one for all, or one per prompt.

        Returns:
            [`Start`]: latents of shape `(N, ...)`, schedule of T steps, conditioning of length N.

        Raises:
            ValueError: if the pipeline's loop is not one of T steps that `scheduler.step` alone makes.
        """
        conditioning = prompts if isinstance(prompts, Conditioning) else self.encode(prompts)
        starts = []

        def scheduler(index: list[int]) -> StandIn:
            steps: list[torch.Tensor] = []

            def on_step(model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
                if not isinstance(sample, torch.Tensor) or sample.ndim < 2:
                    raise ValueError(
                        self._refusal("gives `scheduler.step` something else than latents at its third place")
                    )
                if not steps:
                    if getattr(stand_in, "prepared", sample.shape) != sample.shape:
                        raise ValueError(
                            self._refusal("gives `scheduler.step` a part of the latents that it prepares")
                        )
                    starts.append((sample, steps, stand_in))
                elif sample is not starts[-1][0] and not torch.equal(sample, starts[-1][0]):
                    raise ValueError(self._refusal("changes latents after `scheduler.step`"))
                steps.append(torch.as_tensor(timestep))
                return sample

            stand_in = StandIn.of(self.pipe.scheduler, on_step)
            return stand_in

        calls, asked = self._calls_from_noise(conditioning), self.steps_asked(num_inference_steps)
        self._run(calls, scheduler, output_type="latent", num_inference_steps=asked, generator=generator)
        schedules = []
        for _, steps, stand_in in starts:
            if float(getattr(stand_in, "init_noise_sigma", 1.0)) != 1.0:
                raise ValueError(
                    f"`pipe.scheduler` is a {type(self.pipe.scheduler).__name__}, which scales the denoiser's input by the "
                    "step; a policy cannot. Set `pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)`."
                )
            if len(steps) != num_inference_steps:
                raise ValueError(
                    self._refusal(f"calls `scheduler.step` {len(steps)} times in {num_inference_steps} steps")
                )
            sigmas = getattr(stand_in, "sigmas", None)
            if sigmas is not None:
                sigmas = torch.as_tensor(sigmas).detach().float().cpu()[-num_inference_steps - 1 :]
            schedules.append(Schedule(torch.stack(steps).to(self.device), sigmas))
        if any(not torch.equal(schedule.timesteps, schedules[0].timesteps) for schedule in schedules):
            raise ValueError("The images of a batch have different noise schedules: give them the same size.")
        return Start(_in_places(calls, [start[0].float() for start in starts]), schedules[0], conditioning)

    def steps_asked(self, num_inference_steps: int) -> int:
        """Argument of `__call__` with which the pipeline runs so many steps: more with a `strength` below 1."""
        strength = self.call_kwargs.get("strength", self._call_defaults.get("strength"))
        get_timesteps = getattr(type(self.pipe), "get_timesteps", None)
        if strength is None or get_timesteps is None:
            return num_inference_steps
        wanted = inspect.signature(get_timesteps).parameters

        def run(asked: int) -> int:
            timesteps = torch.arange(asked)
            pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=timesteps, order=1))
            given = dict.fromkeys(("timesteps", "sigmas"), timesteps)
            given |= {"num_inference_steps": asked, "strength": strength, "device": "cpu"}
            return len(get_timesteps(pipe, **{name: value for name, value in given.items() if name in wanted})[0])

        if num_inference_steps not in self._asked:
            candidates = range(num_inference_steps, 1000)
            fitting = (asked for asked in candidates if run(asked) == num_inference_steps)
            self._asked[num_inference_steps] = next(fitting, num_inference_steps)
        return self._asked[num_inference_steps]

    def _refusal(self, reason: str) -> str:
        return f"`pipe` ({type(self.pipe).__name__}) cannot be a policy: with these arguments its loop {reason}."

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

        The pipeline's loop runs from its beginning, without evaluation up to that step, so everything that depends on the
        place in the loop is as in sampling.

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
        outputs, step, asked = [], 0, self.steps_asked(len(schedule.timesteps))

        def on_step(model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
            nonlocal step
            if step == step_index:
                outputs.append(model_output.float())
                raise StepReached
            step += 1
            return sample

        def scheduler(index: list[int]) -> StandIn:
            nonlocal step
            step = 0
            return StandIn.of(self.pipe.scheduler, on_step, schedule, asked - len(schedule.timesteps))

        calls = conditioning.batches
        self._run(
            calls, scheduler, latents.to(self.device), evaluates=lambda: step == step_index, grad=grad,
            num_inference_steps=asked,
        )  # fmt: skip
        self.evaluations += len(latents)
        return _in_places(calls, outputs)

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
        latents = latents.to(self.device)
        if vae is not None and output_type != "latent":
            latents = latents.to(vae.device, vae.dtype)
        schedule, asked = Schedule(torch.zeros(2, device=self.device), torch.zeros(3)), self.steps_asked(2)

        def scheduler(index: list[int]) -> StandIn:
            return StandIn.of(self.pipe.scheduler, lambda *args: latents[index], schedule, asked - 2)

        as_bytes, calls = output_type in ("pil", "uint8"), conditioning.batches
        outputs = self._run(
            calls, scheduler, latents, num_inference_steps=asked, output_type="pt" if as_bytes else output_type,
            generator=[sample_generator("decode") for _ in latents],
        )  # fmt: skip
        output = _in_places(calls, [output[0] for output in outputs])
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
        **columns: list,
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
            **columns (`list`):
                As in [`PipelinePolicy.encode`].

        Returns:
            `float`: largest difference between final latents, in units of the pipeline's standard deviation.

        Raises:
            ValueError: if there is a difference above rounding.
        """
        chosen = [prompts.index(prompt) for prompt in dict.fromkeys(prompts)][:2]
        prompts, before = [prompts[i] for i in chosen], self.evaluations
        generators = [sample_generator("check", i) for i in chosen]
        conditioning = self.encode(prompts, **{name: [column[i] for i in chosen] for name, column in columns.items()})
        latents, schedule, _ = self.start(conditioning, num_inference_steps, generators)
        twice = [self.predict(latents, 0, conditioning, schedule) for _ in range(2)]
        name = type(self.pipe).__name__
        tolerance = 1e-3 if next(self.denoiser.parameters()).dtype == torch.float32 else 0.1
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

        outputs, calls = [], self._calls_from_noise(conditioning)
        for batch in calls:
            runner = self._runner(lambda name, method: method, copy.deepcopy(self.pipe.scheduler))
            with self._text_encoders():
                outputs += runner(
                    **self.texts(batch.prompts), **batch.given, **self.call_kwargs, output_type="latent",
                    num_inference_steps=self.steps_asked(num_inference_steps),
                    generator=[sample_generator("check", chosen[i]) for i in batch.index], return_dict=False,
                )[:1]  # fmt: skip
        expected = _in_places(calls, outputs).float()
        latents = self.decode(latents, conditioning, output_type="latent").float()  # what follows the loop
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


def _outermost(around: Callable[[str, Callable], Callable]) -> Callable[[str, Callable], Callable]:
    """Puts something around methods, unless one of them is called by another."""
    is_inside = False

    def outermost(name: str, method: Callable) -> Callable:
        replacement = around(name, method)

        def called(*args, **kwargs):
            nonlocal is_inside
            if is_inside:
                return method(*args, **kwargs)
            is_inside = True
            try:
                return replacement(*args, **kwargs)
            finally:
                is_inside = False

        return called

    return outermost


def _giving_back(recorded: list[tuple[str, Any]], stand_in: StandIn, latents: torch.Tensor | None) -> Callable:
    """
    What is put around a pipeline's methods so that they return what was recorded, with the given latents; without
    latents, with those that the pipeline prepares, whose shape the stand-in is told.
    """
    pending = defaultdict(list)
    for name, output in reversed(recorded):
        pending[name].append(output)

    def around(name: str, method: Callable) -> Callable:
        def given_back(*args, **kwargs):
            known = pending[name].pop() if pending[name] else None
            if name != "prepare_latents":
                return method(*args, **kwargs) if known is None else known
            if known is not None and latents is not None:
                made = _latents_of(known)
                return _with_latents(known, latents.to(made.device, made.dtype))
            output = method(*args, **kwargs)
            made = _latents_of(output)
            stand_in.prepared = made.shape
            return _with_latents(output if known is None else known, made)

        return given_back

    return around


def _latents_of(prepared: Any) -> torch.Tensor:
    """The latents in what `prepare_latents` returned."""
    return prepared if isinstance(prepared, torch.Tensor) else prepared[0]


def _with_latents(prepared: Any, latents: torch.Tensor) -> Any:
    return latents if isinstance(prepared, torch.Tensor) else type(prepared)((latents, *prepared[1:]))


def _in_places(calls: list[Batch], parts: list) -> torch.Tensor | list:
    """The rows of several calls, in the places that the calls have."""
    if len(parts) == 1:
        return parts[0]
    places = [place for call in calls for place in call.index]
    order = sorted(range(len(places)), key=places.__getitem__)
    if isinstance(parts[0], torch.Tensor):
        if len({part.shape[1:] for part in parts}) > 1:
            raise ValueError(
                "The samples of a batch have different sizes: set `height` and `width` in the pipeline's keyword arguments, or give "
                "it images of one size."
            )
        return torch.cat(parts)[order]
    rows = [row for part in parts for row in part]
    return [rows[i] for i in order]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


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
        copies = copy.deepcopy(policy.denoisers)
        self._policy.pipe.__dict__.update({name: module.requires_grad_(False) for name, module in copies.items()})
        if policy._experts is not None:
            self._policy._experts = Experts(copies)

    @property
    def denoiser(self) -> torch.nn.Module:
        """The denoiser of this policy: the trained one, or the copy."""
        return self._policy.denoiser

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
