"""Loads a pipeline and makes its denoiser ready to be trained."""

import json
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from trl.trainer.utils import disable_dropout_in_model

from .utils import weights_of


def load_pipeline(
    model: str | DiffusionPipeline, dtype: torch.dtype, init_kwargs: dict[str, Any]
) -> DiffusionPipeline:
    """
    The pipeline that a name stands for.

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            Hub id, folder, or a loaded pipeline, which is returned as it is.
        dtype (`torch.dtype`):
            Type of its weights, unless `init_kwargs` says otherwise.
        init_kwargs (`dict[str, Any]`):
            Keyword arguments for [`~diffusers.DiffusionPipeline.from_pretrained`]; `dtype` may be a name.

    Returns:
        [`~diffusers.DiffusionPipeline`]

    Raises:
        TypeError: if `model` is something else.
    """
    if not isinstance(model, str | DiffusionPipeline):
        raise TypeError(
            f"`model` is a {type(model).__name__}: pass a Hub id, a folder or a diffusers pipeline (the whole "
            "pipeline, not its denoiser)."
        )
    if isinstance(model, DiffusionPipeline):
        return model
    init_kwargs = {"dtype": dtype, **init_kwargs}
    if isinstance(init_kwargs["dtype"], str):  # from the command line
        init_kwargs["dtype"] = getattr(torch, init_kwargs["dtype"])
    try:
        components = DiffusionPipeline.load_config(model)
    except OSError:  # `from_pretrained` says what is wrong
        components = {}
    absent = {name: None for name, value in components.items() if value == [None, None]}  # saved without them
    return DiffusionPipeline.from_pretrained(model, **(absent | init_kwargs))


def model_name(model: str | DiffusionPipeline) -> str:
    """The Hub id or folder that a pipeline is, or was loaded from; of one that was made in place, its class."""
    return str(model if isinstance(model, str) else getattr(model, "name_or_path", None) or type(model).__name__)


def _check_components(pipe: DiffusionPipeline, denoisers: dict[str, torch.nn.Module], is_lora: bool) -> None:
    """Raises a `ValueError` for what would train something else than is saved, or nothing."""
    partly = [name for name, denoiser in denoisers.items() if getattr(denoiser, "peft_config", None)]
    if partly and len(partly) < len(denoisers):
        raise ValueError(
            f"`model` has an adapter in {partly} and none in its other denoiser: add one to each of {list(denoisers)}, or merge it by "
            "`pipe.fuse_lora()` and `pipe.unload_lora_weights()`."
        )
    for name, module in pipe.components.items():
        parts = module.modules() if isinstance(module, torch.nn.Module) else ()
        if any(part._diffusers_hook.hooks for part in parts if hasattr(part, "_diffusers_hook")):
            raise ValueError(
                f"`model` has a hook of diffusers in its `{name}` (group offloading, layerwise casting or caching), which does not "
                "work in training: load it without."
            )
        if name.startswith("text_encoder") and getattr(module, "peft_config", None):
            raise ValueError(
                f"`model` has a LoRA in its `{name}`, which would not be saved with the one that is trained: merge it by "
                "`pipe.fuse_lora()` and `pipe.unload_lora_weights()`."
            )
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and (getattr(hook, "offload", False) or type(hook).__name__ == "CpuOffload"):
            raise ValueError(
                f"`model` has a hook that moves its `{name}` to the CPU (`enable_model_cpu_offload` or the like): load it without, "
                "and set `offload_text_encoders=True` to save memory."
            )
    if getattr(pipe, "hf_device_map", None) is not None:
        raise ValueError(
            f"`model` is spread over devices (`device_map`: {pipe.hf_device_map}): load it without `device_map`; accelerate "
            "shares the work among GPUs."
        )
    for name, denoiser in denoisers.items():
        if hasattr(denoiser, "_orig_mod"):
            raise ValueError(
                f"`model.{name}` is compiled by `torch.compile(...)`, and its weights would be saved under names that load as "
                f"nothing: call `model.{name}.compile()` instead, which compiles it in place."
            )
        if getattr(denoiser, "is_quantized", False) and not is_lora:
            raise ValueError(
                f"`model.{name}` is quantised, so its weights cannot be trained: pass a `peft_config` for a LoRA on top."
            )


def active_adapter(denoiser: torch.nn.Module) -> str:
    """
    Name of the adapter that is trained, of a denoiser with adapters.

    Raises:
        ValueError: if several are active, or it is fused, or its strength is not 1.
    """
    active = denoiser.active_adapters
    active = list(active() if callable(active) else active)
    if len(active) != 1:
        raise ValueError(
            f"`model` has the active adapters {active}, but one is trained and saved: choose it with `pipe.set_adapters(...)`, "
            "or merge the others by `pipe.fuse_lora(adapter_names=[...])`."
        )
    name = active[0]
    for layer in (module for module in denoiser.modules() if isinstance(module, LoraLayer)):
        if layer.merged:
            raise ValueError(
                f"The adapter `{name}` of `model` is fused, so it cannot be trained: also call `pipe.unload_lora_weights()`, and pass "
                "a `peft_config`."
            )
        if name in layer.scaling and name in layer.r:
            root = layer.r[name] ** 0.5 if denoiser.peft_config[name].use_rslora else layer.r[name]
            strength = layer.scaling[name] * root / layer.lora_alpha[name]
            if abs(strength - 1) > 1e-6:
                raise ValueError(
                    f"The adapter `{name}` of `model` has the strength {strength:.3g}, which a saved LoRA does not keep: "
                    f"`pipe.set_adapters({name!r}, 1.0)`, or merge it by `pipe.fuse_lora()` and train another on top."
                )
    return name


def prepare_denoisers(
    pipe: DiffusionPipeline, denoisers: dict[str, torch.nn.Module], peft_config: LoraConfig | None
) -> bool:
    """
    Freezes a pipeline except for what is trained: the adapter of `peft_config`, that which a denoiser already has, or
    all weights of the denoisers. Their dropout is switched off.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]):
            The pipeline.
        denoisers (`dict[str, torch.nn.Module]`):
            Its denoisers by name.
        peft_config ([`~peft.LoraConfig`], *optional*):
            Adapter to add to each.

    Returns:
        `bool`: whether an adapter is trained.

    Raises:
        ValueError: if there is an adapter already, if `peft_config` does not fit, or if something else than is saved
            would be trained, or nothing.
    """
    adapted = any(getattr(denoiser, "peft_config", None) for denoiser in denoisers.values())
    _check_components(pipe, denoisers, adapted or peft_config is not None)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    for name, denoiser in denoisers.items():
        if adapted and peft_config is not None:
            raise ValueError(
                f"`peft_config` was given, but the pipeline already has the adapters {list(denoiser.peft_config)}: "
                "leave `peft_config` out to train on, or call `pipe.fuse_lora()` and `pipe.unload_lora_weights()`."
            )
        if adapted:
            denoiser.set_adapter(active_adapter(denoiser))
        elif peft_config is None:
            denoiser.requires_grad_(True)
        else:
            _add_adapter(pipe, name, denoiser, peft_config)
        disable_dropout_in_model(denoiser)
        part = getattr(pipe, name)
        part = part.get_base_model() if isinstance(part, PeftModel) else part
        part._internal_dict = TrackedConfig(part._internal_dict)
    return adapted or peft_config is not None


def compile_denoisers(denoisers: dict[str, torch.nn.Module], accelerator: Accelerator) -> None:
    """
    Compiles, if an accelerator was told to, the blocks of which denoisers consist (regional compilation; those that
    their classes name, else the whole), after adapters were added and before the accelerator prepares them. It is done
    in place, so what samples is what trains, and weights keep their names; accelerate, which would compile what
    updates call alone, is told that it is done.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return
    options = plugin.to_kwargs()
    for denoiser in denoisers.values():
        model = denoiser.get_base_model() if isinstance(denoiser, PeftModel) else denoiser
        names = getattr(model, "_repeated_blocks", None) or getattr(model, "_no_split_modules", None) or ()
        for region in [part for part in model.modules() if type(part).__name__ in names] or [model]:
            region.compile(**options)
    plugin.backend = DynamoBackend.NO


class TrackedConfig(FrozenDict):
    """A denoiser's configuration, which trackers read as they read those of transformers."""

    def to_dict(self) -> dict[str, Any]:
        return json.loads(self.to_json_string())

    def to_json_string(self) -> str:
        return json.dumps(dict(self), indent=2, default=str)


def _add_adapter(pipe: DiffusionPipeline, name: str, denoiser: torch.nn.Module, peft_config: LoraConfig) -> None:
    try:
        if hasattr(denoiser, "add_adapter"):
            denoiser.add_adapter(peft_config)
        else:  # a class without diffusers' own adapters
            setattr(pipe, name, get_peft_model(denoiser, peft_config))
    except ValueError as error:
        denoiser._hf_peft_config_loaded = False  # or diffusers refuses a corrected one on this pipeline
        raise ValueError(f"`peft_config` does not fit {type(denoiser).__name__}: {error}") from error


def save_lora(
    pipe: DiffusionPipeline,
    denoisers: dict[str, torch.nn.Module],
    folder: str,
    state_dict: dict[str, Any] | None = None,
) -> None:
    """
    Writes the adapters of denoisers as the pipeline's `load_lora_weights` reads them, or, where a class has none, as its
    denoiser does (`load_lora_adapter`, or [`~peft.PeftModel.from_pretrained`]). That of a second denoiser goes into a file
    with its name. `state_dict` has the weights of the module that is trained, if they are not in it.
    """
    first = next(iter(denoisers))
    for name, denoiser in denoisers.items():
        own = None if state_dict is None else weights_of(name, denoisers, state_dict)
        adapter = active_adapter(denoiser)
        if isinstance(denoiser, PeftModel):
            denoiser.save_pretrained(folder, state_dict=own)
        elif not hasattr(pipe, "save_lora_weights"):
            denoiser.save_lora_adapter(folder, adapter_name=adapter)
        else:
            layers = get_peft_model_state_dict(denoiser, state_dict=own, adapter_name=adapter)
            metadata = {f"{first}_lora_adapter_metadata": denoiser.peft_config[adapter].to_dict()}
            file = {} if name == first else {"weight_name": f"{name}.safetensors"}
            pipe.save_lora_weights(folder, **{f"{first}_lora_layers": layers}, **metadata, **file)


def place_components(
    pipe: DiffusionPipeline, denoisers: dict[str, torch.nn.Module], device: torch.device, offload_text_encoders: bool
) -> None:
    """Moves all models of a pipeline but its denoisers to a device, or its text encoders to the CPU."""
    for name, component in pipe.components.items():
        offloaded = offload_text_encoders and name.startswith("text_encoder")
        if isinstance(component, torch.nn.Module) and name not in denoisers:
            component.to("cpu" if offloaded else device)
