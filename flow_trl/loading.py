"""Loads a pipeline and makes its denoiser ready to be trained."""

import os
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from trl.trainer.utils import disable_dropout_in_model


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
    components = DiffusionPipeline.load_config(model) if os.path.isdir(model) else {}
    absent = {name: None for name, value in components.items() if value == [None, None]}  # saved without them
    return DiffusionPipeline.from_pretrained(model, **(absent | init_kwargs))


def prepare_denoiser(pipe: DiffusionPipeline, denoiser: torch.nn.Module, peft_config: LoraConfig | None) -> bool:
    """
    Freezes a pipeline except for what is trained: the adapter of `peft_config`, that which the denoiser already has, or
    all weights of the denoiser. Its dropout is switched off.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]):
            The pipeline.
        denoiser (`torch.nn.Module`):
            Its denoiser.
        peft_config ([`~peft.LoraConfig`], *optional*):
            Adapter to add.

    Returns:
        `bool`: whether an adapter is trained.

    Raises:
        ValueError: if there is an adapter already, or `peft_config` does not fit.
    """
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    adapted = bool(getattr(denoiser, "peft_config", None))
    if adapted and peft_config is not None:
        raise ValueError(
            f"`peft_config` was given, but the pipeline already has the adapters {list(denoiser.peft_config)}: "
            "leave `peft_config` out to train on, or call `pipe.fuse_lora()` and `pipe.unload_lora_weights()`."
        )
    if adapted:
        denoiser.set_adapter(denoiser.active_adapters())
    elif peft_config is None:
        denoiser.requires_grad_(True)
    else:
        try:
            denoiser.add_adapter(peft_config)
        except ValueError as error:
            denoiser._hf_peft_config_loaded = False  # or diffusers refuses a corrected one on this pipeline
            raise ValueError(f"`peft_config` does not fit {type(denoiser).__name__}: {error}") from error
    disable_dropout_in_model(denoiser)
    return adapted or peft_config is not None


def place_components(
    pipe: DiffusionPipeline, denoiser: torch.nn.Module, device: torch.device, offload_text_encoders: bool
) -> None:
    """Moves all models of a pipeline but its denoiser to a device, or its text encoders to the CPU."""
    for name, component in pipe.components.items():
        offloaded = offload_text_encoders and name.startswith("text_encoder")
        if isinstance(component, torch.nn.Module) and component is not denoiser:
            component.to("cpu" if offloaded else device)
