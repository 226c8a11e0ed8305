"""What a checkpoint says of the run that wrote it, and which of it may be different when a run goes on from there."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import fields
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftConfig
from PIL import Image
from transformers import TrainingArguments

from . import __version__
from .conditioning import digest
from .engines import local


# Each field of each config is in one of these sets (a test asks for it).

REFUSED = set("""
    adam_beta1 adam_beta2 adam_epsilon adv_clip_max bf16 beta cast_lm_head_to_fp32 chat_template_kwargs cliprange_value
    completion_stride credit critic_decoder critic_encoder data_seed dataloader_drop_last delta disable_dropout ema_decay
    ema_update_steps entropy_coef entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target epsilon epsilon_high
    eta fp16 gamma generation_batch_size generation_kwargs guidance_scale importance_sampling_level
    label_smoothing_factor leave_one_out loss_type mask_truncated_completions max_completion_length max_grad_norm
    max_tool_calling_iterations min_p min_stratum_size multi_objective_aggregation negative_prompt neftune_noise_alpha
    noise_level num_generations num_inference_steps num_iterations off_policy_mask_threshold optim optim_args
    optim_target_modules per_prompt_stat_tracking_buffer_size per_prompt_stat_tracking_min_count pipeline_columns
    pipeline_kwargs ref_model_mixup_alpha ref_model_sync_steps repetition_penalty reset_every reset_neurons
    dormant_threshold reward_weights router_aux_loss_coef sapo_temperature_neg sapo_temperature_pos scale_rewards
    sde_type sde_window_range sde_window_size seed shrinkage shuffle_dataset step_weights sync_ref_model temperature
    top_entropy_quantile top_k top_p train_sampling_strategy train_timestep_fraction updates_per_generation
    use_adaptive_entropy use_bias_correction_kl use_critic vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos
    vllm_importance_sampling_cap vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
    vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_structured_outputs_regex weight_decay baseline
    base_weights blocks charge_missing scheduler train_dataset trainer
""".split())  # fmt: skip
"""Changes what is trained: a run that goes on has the same value, or is refused."""

REFUSED_WITHIN = set("""
    gradient_accumulation_steps per_device_train_batch_size processes steps_per_generation
""".split())  # fmt: skip
"""Changes who does what: refused within a generation, and applied and said after one."""

SCHEDULE = {"learning_rate", "lr_scheduler_kwargs", "lr_scheduler_type", "warmup_steps"}

APPLIED = SCHEDULE | set("""
    accelerator_config average_tokens_across_devices auto_find_batch_size cache_implementation critic_learning_rate
    dataloader_in_order deepspeed fsdp fsdp_config full_determinism liger_kernel_config pad_to_multiple_of
    per_device_decode_batch_size per_device_rollout_batch_size tf32 torch_compile torch_compile_backend
    torch_compile_mode transformers_continuous_batching_config use_cache use_liger_kernel
    use_transformers_continuous_batching use_transformers_paged use_vllm vllm_mode vllm_model_impl
    model reward_funcs versions
""".split())  # fmt: skip
"""May change, and is said: schedules, and what changes the last bits of numbers."""

FREE = set("""
    activation_checkpointing activation_checkpointing_kwargs batch_eval_metrics bf16_full_eval check_pipeline
    dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters
    ddp_static_graph ddp_timeout debug disable_tqdm do_eval do_predict do_train ds3_gather_for_generation
    enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches eval_guidance_scale
    eval_num_inference_steps eval_on_start eval_steps eval_strategy eval_use_gather_object fp16_full_eval
    gradient_checkpointing gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id hub_private_repo
    hub_revision hub_strategy hub_token ignore_data_skip include_for_metrics include_num_input_tokens_seen label_names
    length_column_name load_best_model_at_end local_rank log_completions log_completions_hub_repo log_level
    log_level_replica log_multimodal log_on_each_node log_unique_prompts logging_first_step logging_nan_inf_filter
    logging_steps logging_strategy max_steps metric_for_best_model model_init_kwargs num_completions_to_print
    num_generations_eval num_images_to_save num_train_epochs offload_text_encoders out_of_domain_rewards output_dir
    overlap_rewards parallelism_config per_device_eval_batch_size prediction_loss_only project push_to_hub
    remove_unused_columns report_to restore_callback_states_from_checkpoint resume_from_checkpoint reward_on_error
    reward_retries reward_timeout run_name save_on_each_node save_only_model save_steps save_strategy save_total_limit
    skip_memory_metrics torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id
    trust_checkpoint trust_remote_code use_cpu vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_group_port
    vllm_max_model_length vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout
    vllm_tensor_parallel_size
""".split())  # fmt: skip
"""May change, and is not kept: how long, how often, where to, for whom to see."""

_WITH_STATE = {"reduce_lr_on_plateau", "greedy"}  # schedules that another one cannot go on from
_OF_NO_MATTER = {"auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_dropout",
                 "peft_version", "revision", "task_type"}  # fmt: skip


def arguments(args: TrainingArguments) -> dict[str, Any]:
    """
    Fields of a config by name that are kept in a checkpoint, as JSON has them: all that are not free to change, those
    of a user's own class among them.
    """
    names = [field.name for field in fields(args) if field.name not in FREE and not field.name.endswith("_token")]
    return {name: as_json(getattr(args, name)) for name in names}


def adapter(config: PeftConfig | None) -> dict[str, Any]:
    """What says how an adapter computes, as `arguments` of the name `peft_config.<name>`."""
    known = {"peft_type": None} if config is None else config.to_dict()
    known = {name: value for name, value in known.items() if name not in _OF_NO_MATTER}
    return {f"peft_config.{name}": as_json(value) for name, value in known.items()}


def versions() -> dict[str, str]:
    """Versions of what computes, as `arguments` of the name `versions.<package>`."""
    packages = ("torch", "transformers", "diffusers", "peft", "accelerate", "trl")
    return {"versions.flow_trl": __version__} | {f"versions.{package}": version(package) for package in packages}


def dataset_digest(dataset: Any) -> str | None:
    """
    A short text that differs between data sets that differ in a value, a column or the order of rows; `None` for one
    without a length, of which nothing is known. Files that rows refer to count by their names.
    """
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "__len__"):
        return None
    hashed = hashlib.blake2b(repr(sorted(dataset.column_names)).encode(), digest_size=8)
    for table in dataset.with_format("arrow").iter(1000):
        columns = {name: _without_folders(values) for name, values in table.to_pydict().items()}
        hashed.update(json.dumps(columns, sort_keys=True, default=plain).encode())
    return f"{len(dataset)} rows, {hashed.hexdigest()}"


@torch.no_grad()
def sampled_digest(weights: Iterable[torch.Tensor]) -> str:
    """A short text, the same on every device, of 16 numbers of each of some weights: of a fine-tuned model it differs."""
    hashed = hashlib.blake2b(digest_size=8)
    for weight in weights:
        flat = plain_weight(weight).flatten()
        if flat.device.type != "meta":
            taken = flat[:: max(1, flat.numel() // 16)][:16]
            hashed.update(taken.cpu().double().numpy().tobytes())
    return hashed.hexdigest()


@torch.no_grad()
def fingerprint(weights: Iterable[torch.Tensor]) -> str:
    """A short text that differs between weights that differ (of FSDP: this process's part of them)."""
    sums = []
    for weight in map(plain_weight, weights):
        weight = weight if weight.is_floating_point() else weight.double()  # of bitsandbytes
        sums += [weight.sum(dtype=torch.float64), torch.linalg.vector_norm(weight, dtype=torch.float64)]
    return hashlib.blake2b(torch.stack(sums).cpu().numpy().tobytes(), digest_size=16).hexdigest()


def plain_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight as a tensor of which numbers can be read; of FSDP's, this process's part."""
    weight = local(weight)
    is_torchao = type(weight) not in (torch.Tensor, torch.nn.Parameter) and weight.is_floating_point()
    return weight.dequantize() if is_torchao else weight


def differences(old: dict[str, Any], new: dict[str, Any], *, within_generation: bool) -> tuple[list[str], list[str]]:
    """
    Compares what a checkpoint (written within a generation, or at its end) says of its run with the run that is to go
    on from it: names of values that must not differ, and of those that may. What only one of them knows is left out.
    """
    must_not = REFUSED | REFUSED_WITHIN if within_generation else REFUSED
    refused, applied = [], []
    for name in sorted(old.keys() & new.keys()):
        if old[name] == new[name]:
            continue
        keeps_state = name == "lr_scheduler_type" and _WITH_STATE & {old[name], new[name]}
        is_refused = name in must_not or name.startswith("peft_config.") or keeps_state
        (refused if is_refused else applied).append(name)
    return refused, applied


def described(names: list[str], old: dict[str, Any], new: dict[str, Any]) -> str:
    """What values were and are, in words."""
    return "; ".join(f"`{name}` was {old[name]!r}, now {new[name]!r}" for name in names)


def as_json(value: Any) -> Any:
    """A value as it is after it was written to JSON and read again, without addresses; see [`plain`]."""
    return json.loads(re.sub(r" at 0x[0-9a-f]+", "", json.dumps(value, default=plain, sort_keys=True)))


def plain(value: Any) -> Any:
    """For JSON, what it has not: sets in one order, images, tensors and bytes by their content, the rest as text."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, bytes):
        return hashlib.blake2b(value, digest_size=8).hexdigest()
    return digest(value) if isinstance(value, torch.Tensor | Image.Image) else str(value)


def _without_folders(value: Any) -> Any:
    """A value of a data set; of images and the like that are files, only the name."""
    if isinstance(value, list):
        return [_without_folders(entry) for entry in value]
    if isinstance(value, dict):
        return {
            name: os.path.basename(entry) if name == "path" and isinstance(entry, str) else _without_folders(entry)
            for name, entry in value.items()
        }
    return value
