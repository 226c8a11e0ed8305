# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl[ocr,plots]"]
#
# [tool.uv.sources]
# flow-trl = { path = "..", editable = true }
# ///
"""
Trains a flow-matching pipeline with credit for each step, and shows what it learnt: a table and pictures from before and
after, a learning curve, a LoRA with its card.

The tiny world, a few minutes on two CPU cores; other methods are what the first is compared with:

    python examples/tp_grpo.py
    python examples/tp_grpo.py --method tp_grpo
    python examples/tp_grpo.py --method flow_grpo
    python examples/tp_grpo.py --task words

A real model on GPUs (see examples/README.md for the paper's settings):

    accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/tp_grpo.py \
        --model_name_or_path stabilityai/stable-diffusion-3.5-medium \
        --dataset_name prompts.txt --reward_funcs ocr --pipeline_kwargs '{"height": 512, "width": 512}'
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from datasets import Dataset

from flow_trl import FlowGRPOConfig, FlowGRPOTrainer, TPGRPOConfig, TPGRPOTrainer, tiny
from flow_trl.callbacks import LearningCurveCallback, save_before_and_after
from flow_trl.cli import FLOW_ATTENTION, ImageArguments, Parser, finish, report
from flow_trl.prompts import load_prompts, split_prompts
from flow_trl.rewards.clip import ClipScore
from flow_trl.rewards.scene import MASK2FORMER, SceneReward, TransformersDetector


FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]


@dataclass
class ScriptArguments(ImageArguments):
    """
    Arguments of this script, beside those of `ImageArguments` and [`TPGRPOConfig`] (of [`FlowGRPOConfig`] for
    `--method flow_grpo`). Without a model the tiny world's is trained, with settings, prompts and rewards that suit it.

    Args:
        method (`str`, *optional*, defaults to `"control_variate"`):
            Credit of a step: `"control_variate"` (`TPGRPOConfig.RECOMMENDED`), `"tp_grpo"` (the paper's) or `"flow_grpo"`
            (the finished image's reward).
        task (`str`, *optional*, defaults to `"scenes"`):
            `"scenes"` (objects, counts, colours, positions) or `"words"` (text in the image), for whatever of prompts and
            rewards is not given.
        detector (`str`, *optional*, defaults to `"facebook/mask2former-swin-small-coco-instance"`):
            Mask2Former for the scene rewards of real models.
    """

    method: str = field(
        default="control_variate",
        metadata={"help": "Credit of a step.", "choices": ["control_variate", "tp_grpo", "flow_grpo"]},
    )
    task: str = field(default="scenes", metadata={"help": "What is learnt.", "choices": ["scenes", "words"]})
    detector: str = field(
        default=MASK2FORMER,
        metadata={"help": "Mask2Former for the scene rewards of real models."},
    )


# What suits the tiny world on two CPU cores, where it differs from the paper's setting: no guidance (half the cost), small
# generations, a high learning rate, and, of scenes, two rewards: the agreement with the prompt by the tiny CLIP, and the
# share of what was asked for that is in the picture. Strict accuracy is not trained.
TINY = {
    "pipeline_kwargs": {"max_sequence_length": 0},
    "num_inference_steps": 10,
    "eval_num_inference_steps": 10,
    "guidance_scale": 1.0,
    "num_generations": 16,
    "generation_batch_size": 128,
    "per_device_train_batch_size": 64,
    "per_device_rollout_batch_size": 64,
    "per_device_decode_batch_size": 32,
    "per_device_eval_batch_size": 250,
    "updates_per_generation": 1,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "linear",
    "multi_objective_aggregation": "normalize_then_sum",
    "eval_strategy": "steps",
    "eval_steps": 12,
    "beta": 0.0,
    "ema_decay": 0.0,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
}
TINY_UPDATES = {"control_variate": 48, "tp_grpo": 36, "flow_grpo": 108}  # of about the same time
TINY_WORDS = {"generation_batch_size": 64}


def load_data(arguments: ScriptArguments) -> tuple[Dataset, Dataset]:
    """Training and held-out prompts."""
    name = arguments.dataset_name
    if name is None and arguments.model_name_or_path is None:
        tiny_data = {split: tiny.load_prompts(arguments.task, split) for split in ("train", "test")}
        return split_prompts(tiny_data, arguments.eval_size)
    return load_prompts(name or {"scenes": "geneval", "words": "ocr"}[arguments.task], arguments.eval_size)


def load_tiny_pipeline():
    """The tiny world's pipeline, which decodes faster on CPUs with this layout of its weights."""
    pipe = tiny.load_flow_pipeline()
    pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def reward_functions(arguments: ScriptArguments, args: FlowGRPOConfig) -> tuple[list, list[float]]:
    """Reward functions and the weights of the trained ones; strict accuracy is watched, unless it is asked for."""
    is_tiny = arguments.model_name_or_path is None
    names, weights = {"scenes": (["scene", "scene_strict"], [1.0, 0.0]), "words": (["ocr"], [1.0])}[arguments.task]
    if is_tiny and arguments.task == "scenes":
        names, weights = ["clip_score", *names], [1.0, *weights]
    if arguments.reward_funcs is not None:
        names, weights = arguments.reward_funcs, [1.0] * len(arguments.reward_funcs)
    scenes = ("scene", "scene_strict")
    names = dict.fromkeys([*names, *(name for name in args.out_of_domain_rewards or [] if name in scenes)])
    scene_reward = tiny.scene_reward
    if not is_tiny and any(name in scenes for name in names):
        scene_reward = partial(SceneReward, TransformersDetector(arguments.detector, device=args.device))
    functions = [scene_reward(strict=name == "scene_strict") if name in scenes else name for name in names]
    if is_tiny:
        functions = [ClipScore(*tiny.load_clip()) if name == "clip_score" else name for name in functions]
    return functions, weights


def main() -> None:
    # The model decides the defaults, so it is read first.
    arguments, *_ = Parser(ScriptArguments, add_help=False).parse_args_and_config(return_remaining_strings=True)
    is_flow, is_tiny = arguments.method == "flow_grpo", arguments.model_name_or_path is None
    parser = Parser((ScriptArguments, FlowGRPOConfig if is_flow else TPGRPOConfig))
    parser.set_defaults(output_dir=f"outputs/{arguments.method}_{arguments.task}", eval_on_start=True)
    if arguments.method == "control_variate":
        parser.set_defaults(**TPGRPOConfig.RECOMMENDED)
    if is_tiny:
        updates = TINY_UPDATES[arguments.method]
        words = TINY_WORDS if arguments.task == "words" else {}
        lora = {"lora_rank": 16, "lora_alpha": 32, "lora_target_modules": FLOW_ATTENTION + FEED_FORWARD}
        parser.set_defaults(**{**lora, "max_steps": updates, "logging_steps": updates // 24 or 1, **TINY, **words})
    arguments, args = parser.parse_args_and_config()

    train_dataset, eval_dataset = load_data(arguments)
    reward_funcs, weights = reward_functions(arguments, args)
    args.reward_weights = weights if args.reward_weights is None else args.reward_weights
    trainer = (FlowGRPOTrainer if is_flow else TPGRPOTrainer)(
        model=load_tiny_pipeline() if is_tiny else arguments.model_name_or_path,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=[LearningCurveCallback()],
        peft_config=arguments.peft_config,
    )
    finish(trainer)
    if trainer.is_world_process_zero():
        columns = eval_dataset[: args.num_images_to_save]
        prompts, judge = columns.pop("prompt"), trainer.scorer.in_domain[-1]

        def score(images: list) -> list[float]:
            return trainer.scorer(images, prompts, columns, functions=[judge])[:, judge].tolist()

        save_before_and_after(args.output_dir, score)
    report(trainer, "before_after.png, learning_curve.png, images/, the LoRA and its card (README.md)")


if __name__ == "__main__":
    main()
