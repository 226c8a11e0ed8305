"""
Weights that FSDP2 and DeepSpeed share out over processes, as if they were whole: every engine writes the checkpoints of DDP, and
goes on from them.
"""

import copy
import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from diffusers import DiffusionPipeline
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from .utils import weights_of


def load_whole() -> None:
    """
    Lets transformers load models whole from here on (text encoders, those of rewards): told of ZeRO-3, it would share them
    out, and nothing would gather them.
    """
    unset_hf_deepspeed_config()


def local(weight: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight."""
    if hasattr(weight, "ds_tensor"):  # of ZeRO-3
        return weight.ds_tensor
    return weight.to_local() if isinstance(weight, DTensor) else weight.detach()


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """
    All of a weight, a moment or an average, in the precision in which it is trained: the same on every process. All
    processes call this together.
    """
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(tensor)
    return tensor.detach()


def trained(weight: torch.Tensor) -> torch.Tensor:
    """A weight in the precision in which it is trained; of FSDP, this process's part."""
    return weight if isinstance(weight, DTensor) else whole(weight)


def part(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A whole tensor on a weight's device, shared out as FSDP shares out the weight."""
    value = value.to(weight.device)
    if isinstance(weight, DTensor) and not isinstance(value, DTensor) and value.shape == weight.shape:
        return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)
    return value


def gathered(weights: Iterable[torch.Tensor]) -> AbstractContextManager:
    """Within this context weights of ZeRO-3 are whole, and what the first process writes to them is kept."""
    weights = [weight for weight in weights if hasattr(weight, "ds_id")]
    if not weights:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(weights, modifier_rank=0)


@torch.no_grad()
def assign(weight: torch.Tensor, value: torch.Tensor) -> None:
    """Gives a weight the value that [`whole`] returned. All processes call this together."""
    with gathered([weight]):
        weight.copy_(part(value, weight))
    _set_zero(weight, value)


def _set_zero(weight: torch.Tensor, value: torch.Tensor, moment: str | None = None) -> None:
    """Sets the float32 copy that ZeRO trains of a weight, or a moment of it."""
    key = () if moment is None else (moment,)
    if hasattr(weight, "ds_id"):
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size, rank = weight.ds_tensor.numel(), torch.distributed.get_rank(weight.ds_process_group)
        share = value.new_zeros(size)
        own = value.flatten()[rank * size : (rank + 1) * size]
        share[: len(own)] = own
        set_part = safe_set_local_fp32_param if moment is None else safe_set_local_optimizer_state
        set_part(weight, share.to(weight.device), *key)
    elif hasattr(weight, "_hp_mapping"):
        weight.set_full_hp_param(value.to(weight.device), *key)


def _link_moments(zero: Any) -> None:
    """ZeRO-1 and 2 do this at their first update, before the moments of any but the first group are there."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = not zero.optimizer.state
        zero._lazy_init_hp_params_optimizer_state()


def _split(kept: dict[str, Any], shape: torch.Size) -> tuple[list[str], dict[str, Any]]:
    """Names of the moments among what an optimizer keeps of a weight, and what else it keeps (its step)."""
    moments = [name for name, value in kept.items() if torch.is_tensor(value) and value.shape == shape]
    return moments, {name: value for name, value in kept.items() if name not in moments}


def zero_state(zero: Any, groups: list[list[torch.Tensor]]) -> dict[str, Any]:
    """
    The `state_dict` of a ZeRO optimizer, on the CPU, as the optimizer of a single process would have it. All processes
    call this together.

    Args:
        zero (`deepspeed.runtime.base_optimizer.ZeROOptimizer`):
            The `optimizer` of an engine.
        groups (`list[list[torch.nn.Parameter]]`):
            The weights of its groups.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    _link_moments(zero)
    state = {}
    flat, kept = next(iter(zero.optimizer.state.items()), (None, None))
    if kept:
        moments, rest = _split(kept, flat.shape)
        for index, weight in enumerate(itertools.chain(*groups)):
            whole_moments = {name: safe_get_full_optimizer_state(weight, name).cpu() for name in moments}
            state[index] = whole_moments | copy.deepcopy(rest)
    numbers = itertools.count()
    saved = [
        group | {"params": [next(numbers) for _ in members]}
        for group, members in zip(zero.optimizer.param_groups, groups, strict=True)
    ]
    return {"state": state, "param_groups": saved}


def load_zero_state(zero: Any, groups: list[list[torch.Tensor]], state: dict[str, Any]) -> None:
    """Gives a ZeRO optimizer what [`zero_state`] returned, with any number of processes."""
    optimizer, weights = zero.optimizer, list(itertools.chain(*groups))
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        group |= {name: value for name, value in saved.items() if name != "params"}
    if not state["state"]:
        return
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    moments, rest = _split(state["state"][0], getattr(weights[0], "ds_shape", weights[0].shape))
    # The flat weights of which this process trains a part
    for flat in getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups:
        own = {
            name: value.to(flat.device if on_device else "cpu", copy=True) if torch.is_tensor(value) else value
            for name, value in rest.items()
        }
        optimizer.state[flat] = {name: torch.zeros_like(flat) for name in moments} | own
    _link_moments(zero)
    for index, weight in enumerate(weights):
        for name in moments:
            _set_zero(weight, state["state"][index][name], name)


@contextmanager
def with_weights(
    pipe: DiffusionPipeline, denoisers: dict[str, torch.nn.Module], weights: dict[str, torch.Tensor] | None
) -> Iterator[dict[str, torch.nn.Module]]:
    """
    Within this context a pipeline has copies of its denoisers that hold given weights, to be saved; with
    `weights=None` the denoisers themselves, which are not shared out.
    """
    if weights is None:
        yield denoisers
        return
    copies = {}
    for name, denoiser in denoisers.items():
        plain_class = next(kind for kind in type(denoiser).__mro__ if not issubclass(kind, FSDPModule))
        with torch.device("meta"):
            copies[name] = plain_class.from_config(denoiser.config)
        own = weights_of(name, denoisers, weights) | dict(denoiser.named_buffers())
        copies[name].load_state_dict(own, strict=False, assign=True)
    try:
        for name, denoiser in copies.items():
            setattr(pipe, name, denoiser)
        yield copies
    finally:
        for name, denoiser in denoisers.items():
            setattr(pipe, name, denoiser)


class Engines:
    """
    How a [`~transformers.Trainer`] of pipelines trains, saves and resumes what FSDP2 or DeepSpeed share out: `_trained` and
    `ema` follow the weights, and nothing but them and the optimizer's state is written.
    """

    @property
    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _check_engine(self) -> None:
        """Raises for what cannot work with this engine."""
        load_whole()
        state, args = self.accelerator.state, self.args
        if self.is_fsdp_enabled and state.fsdp_plugin.fsdp_version != 2:
            raise ValueError(
                f"`fsdp_version={state.fsdp_plugin.fsdp_version}` is not supported: set `fsdp_version: 2`, as in "
                "examples/accelerate_configs/fsdp2.yaml."
            )
        if self.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage not in (1, 2, 3):
            raise ValueError(
                f"`zero_stage={state.deepspeed_plugin.zero_stage}` is not supported: set `zero_stage: 2`, as in "
                "examples/accelerate_configs/deepspeed_zero2.yaml, or use DDP."
            )
        if self._is_sharded and not self.is_lora and args.beta:
            raise ValueError(
                f"`beta={args.beta}` with `peft_config=None` keeps a copy of the initial weights, which FSDP and DeepSpeed do not "
                "share out: set `beta=0`, train a LoRA, or use DDP."
            )

    def _place_denoiser(self) -> None:
        """For sampling before training: FSDP and DeepSpeed place it when training begins."""
        if self._is_sharded and not self.accelerator._models:
            self.policy.denoiser.to(self.accelerator.device)

    def _reshard(self) -> None:
        """After weights were written: FSDP keeps a whole copy of some from the last pass without gradients."""
        for module in self.policy.denoiser.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        is_given = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not is_given:  # a LoRA has no weights without decay; DeepSpeed leaves out such groups
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self._groups = [group["params"] for group in optimizer.param_groups]
        return optimizer

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if not self._is_sharded:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._groups = [list(self._trained.values())]  # unless an optimizer is created here
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        load_whole()
        named = fsdp2_canonicalize_names(dict(self.policy.denoiser.named_parameters()))
        self._trained = {name: named[name] for name in self._trained}
        if self.ema is not None:
            self.ema.follow(self._trained)
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.is_deepspeed_enabled:
            state = zero_state(self.model_wrapped.optimizer, self._groups)
        else:
            state = self.optimizer.state_dict()
            for index, moments in state["state"].items():
                state["state"][index] = {
                    name: whole(value).cpu() if torch.is_tensor(value) else value for name, value in moments.items()
                }
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._is_sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state, schedule = (
            torch.load(os.path.join(checkpoint, name), map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        self.lr_scheduler.load_state_dict(schedule)
        if self.is_deepspeed_enabled:
            load_zero_state(self.model_wrapped.optimizer, self._groups, state)
            return
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        for index, moments in state["state"].items():
            state["state"][index] = {
                name: part(value, weights[index]) if torch.is_tensor(value) and value.ndim else value
                for name, value in moments.items()
            }
        self.optimizer.load_state_dict(state)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self._is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        averages = self.ema.averages if self.ema is not None else self._trained
        self._save(output_dir, {name: whole(weight).cpu() for name, weight in averages.items()})
