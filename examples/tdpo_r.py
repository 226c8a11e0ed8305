# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl[plots]"]
#
# [tool.uv.sources]
# flow-trl = { path = "..", editable = true }
# ///
"""
Trains a diffusion pipeline with TDPO-R, or with what it is compared with, and watches whether rewards that are not
trained get worse: a table, a figure of each against the trained reward, pictures from before and after, a LoRA with its
card.

The tiny world, a few minutes on two CPU cores:

    python examples/tdpo_r.py
    python examples/tdpo_r.py --method ddpo

A real model on GPUs (see examples/README.md for the paper's settings):

    accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/tdpo_r.py \
        --model_name_or_path CompVis/stable-diffusion-v1-4 --dataset_name animals.txt \
        --reward_funcs aesthetic --out_of_domain_rewards pickscore clip_score
"""

from dataclasses import dataclass, field

from datasets import Dataset

from flow_trl import DDPOConfig, DDPOTrainer, TDPORConfig, TDPORTrainer, tiny
from flow_trl.callbacks import LearningCurveCallback, OverOptimizationCallback, save_before_and_after
from flow_trl.cli import ATTENTION, ImageArguments, Parser, finish, report
from flow_trl.prompts import load_prompts
from flow_trl.rewards.clip import ClipScore
from flow_trl.tiny.proxy import Proxy, gold


@dataclass
class ScriptArguments(ImageArguments):
    """
    Arguments of this script, beside those of `ImageArguments` and [`TDPORConfig`] (of [`DDPOConfig`] for `--method ddpo`).
    Without a model the tiny world's is trained, with settings and prompts that suit it and the reward `"proxy"`
    ([`flow_trl.tiny.proxy`]).

    Args:
        method (`str`, *optional*, defaults to `"tdpo_r"`):
            `"tdpo_r"`, `"tdpo"` (the critic is never reset) or `"ddpo"` (no critic, updates over all steps at once).
        stop_after_fall (`float`, *optional*):
            Stops when a reward that is not trained has fallen by this share while the trained one rises.
    """

    method: str = field(default="tdpo_r", metadata={"help": "What trains.", "choices": ["tdpo_r", "tdpo", "ddpo"]})
    stop_after_fall: float | None = field(
        default=None, metadata={"help": "Stops when an out-of-domain reward has fallen by this share."}
    )


# What suits the tiny world on two CPU cores, where it differs from the paper's setting: no guidance (half the cost), few
# denoising steps, few prompts, higher learning rates and a wider clip range. A reward that was learnt from few noisy labels is
# trained, and what it was learnt from is watched, which rises at first and then falls. All methods see 24 generations.
TINY = {
    "num_inference_steps": 5,
    "eval_num_inference_steps": 5,
    "guidance_scale": 1.0,
    "num_generations": 8,
    "generation_batch_size": 128,
    "per_device_rollout_batch_size": 128,
    "per_device_eval_batch_size": 200,
    "learning_rate": 8e-3,
    "epsilon": 5e-3,
    "per_prompt_stat_tracking_min_count": 8,
    "out_of_domain_rewards": ["gold"],
    "eval_size": 200,
    "lora_rank": 16,
    "lora_alpha": 32,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
}
TINY_PROMPTS = 16
TINY_TDPO = {
    "per_device_train_batch_size": 32,
    "updates_per_generation": 2,
    "max_steps": 240,
    "logging_steps": 10,
    "eval_steps": 20,
    "critic_encoder": str(tiny.CLIP_FOLDER),
    "critic_learning_rate": 3e-3,
    "reset_every": 5,
}
TINY_DDPO = {
    "per_device_train_batch_size": 16,
    "updates_per_generation": 8,
    "max_steps": 192,
    "logging_steps": 8,
    "eval_steps": 16,
}
# The tiny world's rewards by their names.
TINY_REWARDS = {
    "proxy": Proxy,
    "gold": lambda: gold,
    "clip_score": lambda: ClipScore(*tiny.load_clip()),
    "scene": tiny.scene_reward,
    "scene_strict": lambda: tiny.scene_reward(strict=True),
}


def load_data(arguments: ScriptArguments) -> tuple[Dataset, Dataset]:
    """Training and held-out prompts."""
    if arguments.dataset_name is not None or arguments.model_name_or_path is not None:
        return load_prompts(arguments.dataset_name or "animals", arguments.eval_size)
    train, test = (tiny.load_prompts("scenes", split) for split in ("train", "test"))
    return train.select(range(TINY_PROMPTS)), test.select(range(min(arguments.eval_size, len(test))))


def main() -> None:
    # The model and the method decide the defaults, so they are read first.
    arguments, *_ = Parser(ScriptArguments, add_help=False).parse_args_and_config(return_remaining_strings=True)
    is_ddpo, is_tiny = arguments.method == "ddpo", arguments.model_name_or_path is None
    parser = Parser((ScriptArguments, DDPOConfig if is_ddpo else TDPORConfig))
    parser.set_defaults(output_dir=f"outputs/{arguments.method}", eval_on_start=True, eval_strategy="steps")
    parser.set_defaults(eval_steps=500, eval_size=500, lora_rank=4, lora_alpha=4, lora_target_modules=ATTENTION)
    if arguments.method == "tdpo":
        parser.set_defaults(reset_neurons="none")
    if is_tiny:
        parser.set_defaults(**TINY, **(TINY_DDPO if is_ddpo else TINY_TDPO))
    arguments, args = parser.parse_args_and_config()

    train_dataset, eval_dataset = load_data(arguments)
    reward_funcs = arguments.reward_funcs or ["proxy" if is_tiny else "aesthetic"]
    if is_tiny:
        watched = [name for name in args.out_of_domain_rewards or [] if name in TINY_REWARDS]
        names = dict.fromkeys([*reward_funcs, *watched])
        reward_funcs = [TINY_REWARDS[name]() if name in TINY_REWARDS else name for name in names]
    callbacks = [LearningCurveCallback()]
    if args.out_of_domain_rewards:
        callbacks.append(OverOptimizationCallback(arguments.stop_after_fall))
    trainer = (DDPOTrainer if is_ddpo else TDPORTrainer)(
        model=tiny.load_diffusion_pipeline() if is_tiny else arguments.model_name_or_path,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        peft_config=arguments.peft_config,
    )
    finish(trainer)
    if trainer.is_world_process_zero():
        save_before_and_after(args.output_dir)
    report(trainer, "over_optimization.png, before_after.png, learning_curve.png, images/, the LoRA and its card")


if __name__ == "__main__":
    main()
