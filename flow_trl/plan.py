"""What a configuration would need of GPUs, before they are rented: the trainers' own calls on tensors without entries."""

import copy
import dataclasses
import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ref

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from .cli import ImageArguments, Parser, method_parser
from .loading import load_pipeline, model_name, prepare_denoisers
from .policy import PipelinePolicy
from .stand_ins import Encoded, mode_of
from .trainer.ddpo_config import DDPOConfig
from .trainer.diffusion_config import DiffusionConfig
from .trainer.flow_grpo_config import FlowGRPOConfig
from .trainer.tdpo_r_config import TDPORConfig
from .trainer.tp_grpo_config import TPGRPOConfig
from .utils import sample_generator


GPUS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362, "RTX4090": 165}  # dense bfloat16 TFLOP/s
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
METHODS = {"flow_grpo": FlowGRPOConfig, "tp_grpo": TPGRPOConfig, "ddpo": DDPOConfig, "tdpo_r": TDPORConfig}
PROMPT = "a photo of a red circle left of a blue square"  # of usual length
GB = 10**9
ATTENTION_ON_CPU = {  # which torch does not count by itself; the counter wraps them again
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop.__wrapped__,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop.__wrapped__,
}
flop_counter = partial(FlopCounterMode, display=False, custom_mapping=ATTENTION_ON_CPU)


@dataclass
class Plan:
    """
    What [`plan`] found. Sizes are in bytes, before they are shared among GPUs: `dataclasses.replace(found, num_gpus=64,
    engine="fsdp2")` is the same run on others.

    Args:
        model, method, engine, gpu (`str`), num_gpus (`int`), bf16 (`bool`): what is planned.
        trained_parameters, frozen_parameters (`int`): of all components.
        weights (`dict[str, int]`): by component, of those that are on the GPU.
        denoisers (`list[str]`): components that are trained, and shared by FSDP2 and ZeRO-3.
        largest_block (`int`): of these, which FSDP2 and ZeRO-3 gather in turn.
        gradients, moments, average, reference (`int`): of the gradients, the optimizer, the moving average, and the copy of the
            weights that the KL divergence needs.
        latents (`int`): of one chunk's trajectories, completions and noise.
        sampling, decoding (`int`): most within one call of the denoiser, and of the decoder.
        activations, activations_checkpointed (`int`): most within one micro-batch.
        uses_checkpointing (`bool`): which of the two the configuration has.
        images (`int`): what waits on the CPU of two chunks' pixels and of text encoders.
        trajectories (`int`): trained latents of a generation, on the CPUs of all processes, and in a checkpoint within it.
        checkpoint (`int`): a checkpoint at a generation's end.
        evaluations, decoded, reward_calls (`int`): latents that the policy evaluates in a generation, final images that are
            decoded, and those that each reward function scores.
        generation_flop, update_flop (`int`): FLOP of a generation's sampling and decoding, and of an update, on all GPUs.
        updates_per_generation (`int`): optimizer updates.
        max_steps (`int`): updates of the run, 1000 if the configuration does not say.
        efficiency (`float`): share of the GPU's peak that is assumed.
    """

    model: str
    method: str
    engine: str
    gpu: str
    num_gpus: int
    bf16: bool
    trained_parameters: int
    frozen_parameters: int
    weights: dict[str, int]
    denoisers: list[str]
    largest_block: int
    gradients: int
    moments: int
    average: int
    reference: int
    latents: int
    sampling: int
    decoding: int
    activations: int
    activations_checkpointed: int
    uses_checkpointing: bool
    images: int
    trajectories: int
    checkpoint: int
    evaluations: int
    decoded: int
    reward_calls: int
    generation_flop: int
    update_flop: int
    updates_per_generation: int
    max_steps: int
    efficiency: float

    @property
    def held(self) -> dict[str, int]:
        """What one GPU holds all the time: its share of weights and moments."""
        shares = 1 if self.engine == "ddp" else self.num_gpus
        held = {f"weights of {name}": size for name, size in self.weights.items()}
        if self.engine in ("fsdp2", "zero3") and shares > 1:
            for name in self.denoisers:  # of the gathered blocks one is in use and one on its way
                held[f"weights of {name}"] = self.weights[name] // shares + 2 * self.largest_block
        copies = 4 * self.trained_parameters if self.bf16 and self.engine.startswith("zero") else 0
        return held | {
            "optimizer": (self.moments + copies) // shares,
            "moving average": self.average // (shares if self.engine == "fsdp2" else 1),
            "reference": self.reference,
        }

    @property
    def peaks(self) -> dict[str, int]:
        """Most that one GPU needs while it samples, decodes and updates."""
        held = sum(self.held.values())
        gradients = self.gradients // self.num_gpus if self.engine != "ddp" else self.gradients
        if self.engine == "ddp" and self.num_gpus > 1:
            gradients *= 2  # buckets in which they are reduced
        activations = self.activations_checkpointed if self.uses_checkpointing else self.activations
        return {
            "sampling": held + self.latents + self.sampling,
            "decoding": held + self.decoding,
            "updating": held + gradients + activations,
        }

    @property
    def cpu(self) -> int:
        """What one process needs on the CPU, beside its libraries."""
        return self.images + self.trajectories // self.num_gpus

    @property
    def hours(self) -> float:
        """Hours of sampling, decoding and updates; rewards come on top."""
        generations = math.ceil(self.max_steps / self.updates_per_generation)
        flop = generations * self.generation_flop + self.max_steps * self.update_flop
        return flop / (self.num_gpus * GPUS[self.gpu] * self.efficiency * 1e12) / 3600

    def __str__(self) -> str:
        sizes = self.held | {"gradients": self.gradients, "latents": self.latents}
        sizes |= {"a call of the denoiser": self.sampling, "a call of the decoder": self.decoding}
        sizes |= {"activations": self.activations, "activations, checkpointed": self.activations_checkpointed}
        sizes |= {f"**peak while {name}**": size for name, size in self.peaks.items()}
        rows = {
            "parameters": f"{self.trained_parameters:,} trained, {self.frozen_parameters:,} frozen",
            **{f"GPU: {name}": _text(size) for name, size in sizes.items()},
            "CPU, per process": _text(self.cpu),
            "a generation": f"{self.evaluations:,} evaluations, {self.decoded:,} images decoded, {self.reward_calls:,} scored by "
            f"each reward function, {self.generation_flop / 1e12:,.3g} TFLOP",
            "an update": f"{self.update_flop / 1e12:,.3g} TFLOP, {self.updates_per_generation} per generation",
            f"{self.max_steps} updates": f"{self.hours:.3g} hours without rewards, at {self.efficiency:.0%} of the "
            f"{GPUS[self.gpu]} TFLOP/s of a {self.gpu}",
            "a checkpoint": f"{_text(self.checkpoint)}, within a generation {_text(self.trajectories)} more",
        }
        head = f"{self.method} of {self.model}, {self.num_gpus} x {self.gpu}, {self.engine}, {'bf16' if self.bf16 else 'fp32'}"
        lines = [f"| {head} | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]
        lines += ["", f"| peak of a GPU | {' | '.join(ENGINES)} | hours |", "| --- |" + " --- |" * (len(ENGINES) + 1)]
        for count in (1, 2, 4, 8, 16, 32, 64):
            plans = [dataclasses.replace(self, num_gpus=count, engine=engine) for engine in ENGINES]
            peaks = [_text(max(found.peaks.values())) for found in plans]
            lines.append(f"| {count} x {self.gpu} | {' | '.join(peaks)} | {plans[0].hours:.3g} |")
        return "\n".join(lines)


_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and still alive: `now`, and the most so far: `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, output)
        if func in _CONVOLUTIONS and not _is_channels_last(args[0]):  # copied into a layout of its own, while it runs
            self.peak = max(self.peak, self.now + args[0].untyped_storage().nbytes())
        return output

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leaves out tensors that were there before, with their views."""
        for tensor in tensors:
            self._see(tensor, 0)

    def _see(self, tensor: torch.Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if size is None else size
        if key not in self._known:
            self._known[key] = ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


class _Probe:
    """Lets the models of a pipeline run on tensors without entries, whatever its own code gives them, and counts."""

    def __init__(self):
        self.mode, self.memory = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
        self.flop, self.outputs, self._inside = 0, [], False

    def fake(self, weight: torch.Tensor) -> torch.Tensor:
        """Without entries, on the CPU: what asks a weight for its device gets one that tensors can be made on."""
        with self.mode:
            return torch.empty(weight.shape, dtype=weight.dtype)

    def watch(self, modules: Iterable[torch.nn.Module]) -> None:
        for module in modules:
            self.memory.ignore([*module.parameters(), *module.buffers()])
            for name in ("forward", "encode", "decode"):
                if hasattr(module, name):
                    module.__dict__[name] = self._watched(name, getattr(module, name))

    @contextmanager
    def counting(self) -> Iterator[None]:
        self._inside = True
        try:
            with self.mode, flop_counter() as counter, self.memory:
                yield
            self.flop += counter.get_total_flops()
        finally:
            self._inside = False

    def _watched(self, name: str, method: Callable) -> Callable:
        def watched(*args, **kwargs):
            if self._inside:
                return method(*args, **kwargs)
            with self.counting():
                args, kwargs = tree_map_only(torch.Tensor, self.mode.from_tensor, (args, kwargs))
                output = method(*args, **kwargs)
                output = mode_of(output) if name == "encode" else output
            if torch.is_grad_enabled():
                self.outputs += [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            real = tree_map_only(torch.Tensor, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype), output)
            return Encoded(real) if name == "encode" else real

        return watched

    def measured(self, function: Callable, *args) -> tuple[int, int]:
        """Most bytes that a call needs beyond what was there, and its FLOP."""
        self.memory.peak, self.flop, before = self.memory.now, 0, self.memory.now
        function(*args)
        return self.memory.peak - before, self.flop

    def backward(self) -> None:
        with self.counting():
            sum(output.float().square().mean() for output in self.outputs).backward()
        self.outputs.clear()


def _module_class(name: str, library: str, class_name: str) -> type[torch.nn.Module] | None:
    package = {"diffusers": diffusers, "transformers": transformers}.get(library)
    if package is None:
        try:
            package = importlib.import_module(f"diffusers.pipelines.{library}")
        except ImportError as error:
            raise ValueError(
                f"`model` has a `{name}` of the library {library!r}, whose weights would have to be loaded: plan with a loaded pipeline."
            ) from error
    found = getattr(package, class_name)
    return found if isinstance(found, type) and issubclass(found, torch.nn.Module) else None


def _on_meta(model: str | DiffusionPipeline, dtype: torch.dtype, init_kwargs: dict[str, Any]) -> DiffusionPipeline:
    """The pipeline with its models on the device "meta". Of a name the configs and tokenizers are read, never weights."""
    if not isinstance(model, str):
        pipe = copy.copy(load_pipeline(model, dtype, init_kwargs))
        _replace_weights(pipe, lambda weight: weight.detach().to("meta"))
        return pipe
    built = {}
    for name, value in DiffusionPipeline.load_config(model).items():
        if name in init_kwargs or not isinstance(value, list | tuple) or value[0] is None:
            continue
        module_class = _module_class(name, *value)
        if name == "safety_checker":
            built[name] = None
        elif module_class is not None:
            with torch.device("meta"):
                if value[0] == "transformers":
                    module = module_class(module_class.config_class.from_pretrained(model, subfolder=name))
                else:
                    module = module_class.from_config(module_class.load_config(model, subfolder=name))
            built[name] = module.to(dtype)
    return load_pipeline(model, dtype, built | init_kwargs)


def _replace_weights(
    pipe: DiffusionPipeline, make: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.nn.Module]:
    """Puts copies of its models with other weights into a pipeline; a weight that several share stays one."""
    modules = {name: module for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
    for name, module in modules.items():
        made = {id(buffer): make(buffer) for buffer in module.buffers()}
        for weight in module.parameters():
            made[id(weight)] = torch.nn.Parameter(make(weight), weight.requires_grad)
        modules[name] = pipe.__dict__[name] = copy.deepcopy(module, made).eval()
    return modules


def _text(size: int) -> str:
    return f"{size / GB:.2f} GB" if size >= GB / 10 else f"{size / 10**6:.2f} MB"


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _moments(optim: str) -> int:
    """Bytes of the optimizer's state per trained parameter."""
    if "8bit" in optim:
        return 2
    return {"sgd": 0, "adafactor": 0, "adagrad": 4, "lion_32bit": 4}.get(str(optim), 8)


def _has_completions(args: DiffusionConfig) -> bool:
    return isinstance(args, TPGRPOConfig) and args.credit != "outcome"


def evaluations_per_image(args: DiffusionConfig) -> float:
    """
    Latents that the policy evaluates for one image of a generation, its completions included; in a window that moves,
    the mean over its places.
    """
    steps, trained = args.num_inference_steps, args.num_trained_steps
    if not _has_completions(args):
        return steps
    first, last = args.sde_window_range or (0, steps - 1)
    starts = range(first, last - trained + 1)
    taken = [range(start, start + trained) for start in starts]
    # A completion's first step is the trajectory's own
    lengths = [math.ceil((steps - i) / args.completion_steps) - 1 for window in taken for i in window]
    return steps + sum(lengths) / len(starts)


def _check(args: DiffusionConfig, num_gpus: int, engine: str, gpu: str, efficiency: float) -> str:
    """The method that is planned, by its name; raises if an argument of [`plan`] does not fit."""
    for name, value, choices in (("engine", engine, ENGINES), ("gpu", gpu, tuple(GPUS))):
        if value not in choices:
            raise ValueError(f"`{name}={value!r}` is not known: choose one of {choices}.")
    if not 0 < efficiency <= 1:
        raise ValueError(f"`efficiency={efficiency}` is a share of the GPU's peak: it must be in (0, 1].")
    method = next((name for name, config in METHODS.items() if type(args) is config), None)
    if method is None:
        raise ValueError(
            f"`args` is a {type(args).__name__}: plan with one of {[c.__name__ for c in METHODS.values()]}."
        )
    unit = args.per_device_train_batch_size * num_gpus * args.updates_per_generation
    if num_gpus < 1 or args.generation_batch_size % unit:
        raise ValueError(
            f"`num_gpus={num_gpus}` does not fit: `generation_batch_size={args.generation_batch_size}` must be a "
            f"multiple of {unit} = `per_device_train_batch_size` * `num_gpus` * `updates_per_generation`."
        )
    return method


def plan(
    model: str | DiffusionPipeline,
    args: DiffusionConfig,
    peft_config: LoraConfig | None = None,
    *,
    bf16: bool | None = None,
    num_gpus: int = 1,
    engine: str = "ddp",
    gpu: str = "H100",
    efficiency: float = 0.4,
) -> Plan:
    r"""
    What a configuration of a diffusion trainer would need.

    The pipeline's configs are loaded without its weights, and one chunk is encoded, denoised, decoded and trained by the calls that
    the trainer makes, on tensors that have shapes but no entries: memory is that of all tensors alive at once, FLOP are those of
    [`torch.utils.flop_counter`]. Measured peaks differ by what libraries take within an operation and, on GPUs, by fragmentation
    and the CUDA context (about 1 GB). For more than one GPU the shares of FSDP2, ZeRO-2 and ZeRO-3 are counted from the sizes. Not
    in it: reward models and the critic's encoder, encoding of the prompts (once in a run), evaluations.

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            Hub id or folder of a pipeline, or a loaded one, which is not changed.
        args ([`~flow_trl.trainer.diffusion_config.DiffusionConfig`]):
            Arguments of the trainer; its class is the method.
        peft_config ([`~peft.LoraConfig`], *optional*):
            LoRA to train. If not set, all weights of the denoiser.
        bf16 (`bool`, *optional*):
            Whether to plan for bfloat16. If not set, `args.bf16`, which is `False` where no GPU is.
        num_gpus (`int`, *optional*, defaults to `1`):
            Number of GPUs, one process each.
        engine (`str`, *optional*, defaults to `"ddp"`):
            What shares the work among them: `"ddp"`, `"fsdp2"`, `"zero2"` or `"zero3"`.
        gpu (`str`, *optional*, defaults to `"H100"`):
            One of `GPUS`, for the estimated hours.
        efficiency (`float`, *optional*, defaults to `0.4`):
            Share of the GPU's peak that is assumed to be reached.

    Returns:
        [`Plan`]: `print` it for a table.

    Raises:
        ValueError: if an argument is not one of those above, or the generation cannot be shared among the GPUs.

    Example:

    ```python
    >>> args = TPGRPOConfig("out", pipeline_kwargs={"height": 512, "width": 512}, activation_checkpointing=True)
    >>> lora = LoraConfig(r=32, lora_alpha=64, target_modules=["to_q", "to_k", "to_v"])
    >>> print(plan("stabilityai/stable-diffusion-3.5-medium", args, lora, bf16=True, num_gpus=8))
    ```
    """
    method = _check(args, num_gpus, engine, gpu, efficiency)
    bf16 = bool(args.bf16 if bf16 is None else bf16)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16)
    dtype = torch.bfloat16 if bf16 and peft_config is not None else torch.float32
    pipe = _on_meta(model, dtype, args.model_init_kwargs or {})
    if isinstance(args, DDPOConfig):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    options = {
        "guidance_scale": args.guidance_scale,
        "negative_prompt": args.negative_prompt,
        **(args.pipeline_kwargs or {}),
    }
    denoisers = PipelinePolicy(pipe, **options).denoisers
    is_lora = prepare_denoisers(pipe, denoisers, peft_config)
    if bf16:
        cast_training_params([getattr(pipe, name) for name in denoisers], dtype=torch.float32)
    probe = _Probe()
    modules = _replace_weights(pipe, probe.fake)
    policy = PipelinePolicy(pipe, **options)  # anew, of these models
    denoisers = policy.denoisers
    parameters = {name: list(module.parameters()) for name, module in modules.items()}
    weights = {name: _bytes([*parameters[name], *module.buffers()]) for name, module in modules.items()}
    trained = [weight for name in denoisers for weight in parameters[name] if weight.requires_grad]
    trained_count, trained_bytes = sum(weight.numel() for weight in trained), _bytes(trained)
    count = sum(weight.numel() for own in parameters.values() for weight in own)
    probe.watch(modules.values())

    steps, images, finals = args.num_inference_steps, args.generation_batch_size // num_gpus, 1
    stochastic = steps if isinstance(args, DDPOConfig) else args.num_trained_steps
    if _has_completions(args):
        finals += stochastic
    rollout_size = min(args.per_device_rollout_batch_size, images * finals)
    chunk = min(args.per_device_rollout_batch_size, images)
    decode_size = min(args.per_device_decode_batch_size or args.per_device_rollout_batch_size, chunk * finals)

    with torch.no_grad():
        conditioning = policy.encode([PROMPT])
        latents, schedule, _ = policy.start(conditioning, steps, [sample_generator(0)])

    def batch(size: int) -> tuple[torch.Tensor, Any]:
        return latents.expand(size, *latents.shape[1:]).clone(), conditioning[[0] * size]

    def denoise(size: int, grad: bool) -> None:
        given, conditions = batch(size)
        with autocast():
            policy.predict(given, 0, conditions, schedule, grad=grad)
        if grad:
            probe.backward()

    pixels: list[torch.Tensor] = []

    def decode() -> None:
        with autocast():
            pixels.append(policy.decode(*batch(decode_size), output_type="uint8"))

    sampling, sampling_flop = probe.measured(denoise, rollout_size, False)
    with torch.no_grad():
        decoding, decoding_flop = probe.measured(decode)
    micro_batch, training = args.per_device_train_batch_size, {}
    for denoiser in denoisers.values():  # as the trainer sets it
        denoiser.train()
        denoiser.training = False
    with probe.counting():
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
    for checkpointed in (False, True):
        if checkpointed:
            for denoiser in denoisers.values():
                denoiser.enable_gradient_checkpointing()
        training[checkpointed] = probe.measured(denoise, micro_batch, True)

    # Sums
    generation_images = args.generation_batch_size
    evaluations = round(generation_images * evaluations_per_image(args))
    decoded = generation_images * (finals + (steps if method == "tdpo_r" and args.use_critic else 0))
    step_flop = sampling_flop / rollout_size
    generation_flop = evaluations * step_flop + decoded * decoding_flop / decode_size
    micro_flop = training[bool(args.activation_checkpointing)][1] / micro_batch
    if args.beta:
        if isinstance(args, DDPOConfig):
            generation_flop += generation_images * steps * step_flop
        else:
            micro_flop += step_flop
    update_images = generation_images // args.updates_per_generation
    update_flop = update_images * args.num_trained_steps // args.num_sweeps * micro_flop

    parts = [part for denoiser in denoisers.values() for part in denoiser.children()]
    blocks = [block for part in parts if isinstance(part, torch.nn.ModuleList) for block in part]
    waiting = 0
    if args.offload_text_encoders:
        waiting = sum(weights.pop(name) for name in list(weights) if name.startswith("text_encoder"))
    latent, pixel_bytes = 4 * latents[0].numel(), pixels[0][0].numel()
    denoiser_bytes = sum(_bytes(parameters[name]) for name in denoisers)
    average, moments = trained_bytes if args.ema_decay else 0, trained_count * _moments(args.optim)
    return Plan(
        model=model_name(model),
        method=method,
        engine=engine,
        gpu=gpu,
        num_gpus=num_gpus,
        bf16=bf16,
        trained_parameters=trained_count,
        frozen_parameters=count - trained_count,
        weights=weights,
        denoisers=list(denoisers),
        largest_block=max((_bytes(block.parameters()) for block in blocks), default=0),
        gradients=trained_bytes,
        moments=moments,
        average=average,
        reference=denoiser_bytes if args.beta and not is_lora else 0,
        latents=(2 * stochastic + 1 + finals) * chunk * latent,
        sampling=sampling,
        decoding=decoding,
        activations=training[False][0],
        activations_checkpointed=training[True][0],
        uses_checkpointing=bool(args.activation_checkpointing),
        images=waiting + chunk * pixel_bytes * (6 * finals + 4) // 3,  # two chunks, and a completion as PIL images
        trajectories=generation_images * (latent * (stochastic + 1) + 4 * stochastic),
        checkpoint=(trained_bytes if is_lora else denoiser_bytes) + trained_bytes + average + moments,
        evaluations=evaluations,
        decoded=decoded,
        reward_calls=generation_images * finals,
        generation_flop=round(generation_flop),
        update_flop=round(update_flop),
        updates_per_generation=args.updates_per_generation * args.num_sweeps * args.num_iterations,
        max_steps=args.max_steps if args.max_steps > 0 else 1000,
        efficiency=efficiency,
    )


@dataclass
class ScriptArguments:
    """Arguments of `python -m flow_trl.plan`, beside those of `flow-trl`; see [`plan`]."""

    method: str = field(default="tp_grpo", metadata={"help": "Trainer.", "choices": list(METHODS)})
    num_gpus: int = field(default=1, metadata={"help": "Number of GPUs."})
    engine: str = field(default="ddp", metadata={"help": "What shares the work.", "choices": list(ENGINES)})
    gpu: str = field(default="H100", metadata={"help": "GPU, for the hours.", "choices": list(GPUS)})
    efficiency: float = field(default=0.4, metadata={"help": "Share of the GPU's peak that is assumed."})
    precision: str = field(default="bf16", metadata={"help": "Precision.", "choices": ["bf16", "fp32"]})


def main() -> None:
    # The method decides the arguments, so it is read first.
    arguments, *_ = Parser(ScriptArguments, add_help=False).parse_args_and_config(return_remaining_strings=True)
    parser = method_parser(arguments.method, ScriptArguments, ImageArguments)
    parser.set_defaults(output_dir="outputs/plan", use_cpu=True, report_to="none")
    arguments, trained, args = parser.parse_args_and_config()
    if trained.model_name_or_path is None:
        parser.error("--model_name_or_path must be given")
    options = {name: getattr(arguments, name) for name in ("num_gpus", "engine", "gpu", "efficiency")}
    bf16 = arguments.precision == "bf16"
    print(plan(trained.model_name_or_path, args, trained.peft_config, bf16=bf16, **options))


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    main()
