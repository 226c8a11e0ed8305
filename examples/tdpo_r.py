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
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import TrlParser

from flow_trl import DDPOConfig, DDPOTrainer, TDPORConfig, TDPORTrainer, tiny
from flow_trl.callbacks import (
    LearningCurveCallback,
    OverOptimizationCallback,
    reward_table,
    save_before_and_after,
)
from flow_trl.rewards.clip import ClipScore
from flow_trl.tiny.proxy import Proxy, gold


@dataclass
class ScriptArguments:
    """
    Arguments of this script, beside those of [`TDPORConfig`] (of [`DDPOConfig`] for `--method ddpo`).

    Args:
        method (`str`, *optional*, defaults to `"tdpo_r"`):
            `"tdpo_r"`, `"tdpo"` (the critic is never reset) or `"ddpo"` (no critic, updates over all steps at once).
        model_name_or_path (`str`, *optional*):
            Pipeline to train: Hub id or folder. If not set, the tiny world's, with settings that suit it.
        dataset_name (`str`, *optional*):
            Prompts: Hub id, or a `.jsonl` or `.txt` file. If not set, the tiny world's scenes.
        reward_funcs (`list[str]`, *optional*):
            Names of the trained rewards. If not set, `"aesthetic"`, and in the tiny world `"proxy"` ([`flow_trl.tiny.proxy`]).
        eval_size (`int`, *optional*, defaults to `500`):
            Number of held-out prompts.
        lora_rank (`int`, *optional*, defaults to `4`):
            Rank of the LoRA; 0 trains all weights.
        lora_alpha (`int`, *optional*, defaults to `4`):
            Scale of the LoRA.
        lora_target_modules (`list[str]`, *optional*):
            Modules with a LoRA. Defaults to all attention projections.
        stop_after_fall (`float`, *optional*):
            Stops when a reward that is not trained has fallen by this share while the trained one rises.
    """

    method: str = field(default="tdpo_r", metadata={"help": "What trains.", "choices": ["tdpo_r", "tdpo", "ddpo"]})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pipeline to train; default: the tiny one."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Prompts: Hub id, .jsonl or .txt file."})
    reward_funcs: list[str] | None = field(default=None, metadata={"help": "Names of the trained rewards."})
    eval_size: int = field(default=500, metadata={"help": "Number of held-out prompts."})
    lora_rank: int = field(default=4, metadata={"help": "Rank of the LoRA; 0 trains all weights."})
    lora_alpha: int = field(default=4, metadata={"help": "Scale of the LoRA."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"], metadata={"help": "Modules with a LoRA."}
    )
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
    "eval_steps": 20,
    "critic_encoder": str(tiny.CLIP_FOLDER),
    "critic_learning_rate": 3e-3,
    "reset_every": 5,
}
TINY_DDPO = {"per_device_train_batch_size": 16, "updates_per_generation": 8, "max_steps": 192, "eval_steps": 16}
# The tiny world's rewards by their names.
TINY_REWARDS = {
    "proxy": Proxy,
    "gold": lambda: gold,
    "clip_score": lambda: ClipScore(*tiny.load_clip()),
    "scene": tiny.scene_reward,
    "scene_strict": lambda: tiny.scene_reward(strict=True),
}


def load_prompts(arguments: ScriptArguments) -> tuple[Dataset, Dataset]:
    """Training and held-out prompts."""
    name, size = arguments.dataset_name, arguments.eval_size
    if name is None:
        data = {split: tiny.load_prompts("scenes", split) for split in ("train", "test")}
        data["train"] = data["train"].select(range(TINY_PROMPTS))
    elif Path(name).suffix == ".txt":
        data = load_dataset("text", data_files=name).rename_column("text", "prompt")
    elif Path(name).suffix in (".json", ".jsonl"):
        data = load_dataset("json", data_files=name)
    else:
        data = load_dataset(name)
    if "test" not in data:
        data = data["train"].train_test_split(test_size=max(1, min(size, len(data["train"]) // 10)), seed=0)
    return data["train"], data["test"].select(range(min(size, len(data["test"]))))


def main() -> None:
    # The model and the method decide the defaults, so they are read first.
    arguments, *_ = TrlParser(ScriptArguments, add_help=False).parse_args_and_config(return_remaining_strings=True)
    is_ddpo, is_tiny = arguments.method == "ddpo", arguments.model_name_or_path is None
    parser = TrlParser((ScriptArguments, DDPOConfig if is_ddpo else TDPORConfig))
    parser.set_defaults(
        output_dir=f"outputs/{arguments.method}", eval_on_start=True, eval_strategy="steps", eval_steps=500
    )
    if arguments.method == "tdpo":
        parser.set_defaults(reset_neurons="none")
    if is_tiny:
        parser.set_defaults(**TINY, **(TINY_DDPO if is_ddpo else TINY_TDPO))
    arguments, args = parser.parse_args_and_config()

    train_dataset, eval_dataset = load_prompts(arguments)
    reward_funcs = arguments.reward_funcs or ["proxy" if is_tiny else "aesthetic"]
    if is_tiny:
        watched = [name for name in args.out_of_domain_rewards or [] if name in TINY_REWARDS]
        names = dict.fromkeys([*reward_funcs, *watched])
        reward_funcs = [TINY_REWARDS[name]() if name in TINY_REWARDS else name for name in names]
    peft_config = None
    if arguments.lora_rank:
        peft_config = LoraConfig(
            r=arguments.lora_rank,
            lora_alpha=arguments.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=arguments.lora_target_modules,
        )
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
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_reward" in entry]
    if evaluated[-1:] != [trainer.state.global_step]:
        trainer.evaluate()
    trainer.save_model()
    trainer.save_state()

    if trainer.is_world_process_zero():
        save_before_and_after(args.output_dir)
        print(f"\nHeld out: {len(eval_dataset)} prompts, one image each\n")
        print(reward_table(trainer.state.log_history))
        folder = Path(args.output_dir)
        print(
            f"\nIn {folder}: over_optimization.png, before_after.png, learning_curve.png, images/, the LoRA and its card "
            "(README.md)"
        )
    if args.push_to_hub:  # again, with the pictures
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
