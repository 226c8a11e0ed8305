# /// script
# requires-python = ">=3.11"
# dependencies = ["flow-trl[plots]"]
#
# [tool.uv.sources]
# flow-trl = { path = "..", editable = true }
# ///
"""
Trains an image-to-image pipeline to edit pictures: each prompt comes with the picture that is to be changed. A few
minutes on two CPU cores, and a table, pictures and a LoRA with its card at the end:

    python examples/edit_grpo.py

The tiny world's task: of two shapes one gets another colour, and both stay where they are. The pipeline is diffusers'
`StableDiffusion3Img2ImgPipeline` with the shipped weights, which never saw an edit. A real editing model (FLUX Kontext,
Qwen-Image-Edit) is trained the same way: a data set with the columns `prompt` and `image`, and a reward that compares the two.
"""

import torch
from diffusers import StableDiffusion3Img2ImgPipeline
from peft import LoraConfig

from flow_trl import TPGRPOConfig, TPGRPOTrainer, tiny
from flow_trl.callbacks import LearningCurveCallback
from flow_trl.cli import FLOW_ATTENTION, Parser, finish, report
from flow_trl.tiny.edits import EditReward, load_edits


TINY = {
    **TPGRPOConfig.RECOMMENDED,
    "output_dir": "outputs/edit_grpo",
    "pipeline_kwargs": {"max_sequence_length": 0, "strength": 0.5},
    "num_inference_steps": 8,
    "eval_num_inference_steps": 8,
    "guidance_scale": 1.0,
    "num_generations": 16,
    "generation_batch_size": 128,
    "per_device_train_batch_size": 64,
    "per_device_rollout_batch_size": 64,
    "per_device_decode_batch_size": 32,
    "per_device_eval_batch_size": 200,
    "updates_per_generation": 1,
    "max_steps": 40,
    "logging_steps": 2,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "linear",
    "reward_weights": [1.0, 0.0],
    "eval_strategy": "steps",
    "eval_on_start": True,
    "eval_steps": 20,
    "beta": 0.0,
    "ema_decay": 0.0,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
}


def main() -> None:
    parser = Parser(TPGRPOConfig)
    parser.set_defaults(**TINY)
    (args,) = parser.parse_args_and_config()
    pipe = StableDiffusion3Img2ImgPipeline(**tiny.load_flow_pipeline().components)
    pipe.vae.to(memory_format=torch.channels_last)  # decodes faster on CPUs
    trainer = TPGRPOTrainer(
        model=pipe,
        reward_funcs=[EditReward(), EditReward(strict=True)],
        args=args,
        train_dataset=load_edits("train"),
        eval_dataset=load_edits("test"),
        callbacks=[LearningCurveCallback()],
        peft_config=LoraConfig(r=16, lora_alpha=32, init_lora_weights="gaussian", target_modules=FLOW_ATTENTION),
    )
    finish(trainer)
    report(trainer, "images/ (each input beside its result), learning_curve.png, the LoRA and its card (README.md)")


if __name__ == "__main__":
    main()
