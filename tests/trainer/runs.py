"""Tiny training runs. As a script, `accelerate launch runs.py spec.json` does the runs of a list one after another."""

import dataclasses
import os
import signal

import datasets
import numpy as np
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from flow_trl import (
    DDPOConfig,
    DDPOTrainer,
    FlowGRPOConfig,
    FlowGRPOTrainer,
    TDPORConfig,
    TDPORTrainer,
    TPGRPOConfig,
    TPGRPOTrainer,
)
from flow_trl.engines import local, whole
from tests import pipelines, two_processes


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
COLORS, SHAPES = ["red", "green", "blue", "black"], ["circle", "square"]
PROMPTS = [f"a {color} {shape}" for shape in SHAPES for color in COLORS]
METHODS = {
    "tp": (TPGRPOConfig, TPGRPOTrainer),
    "flow": (FlowGRPOConfig, FlowGRPOTrainer),
    "ddpo": (DDPOConfig, DDPOTrainer),
    "tdpo_r": (TDPORConfig, TDPORTrainer),
}


def prompts(count=8, easy=()):
    """Rows with the prompt, its number, and whether every image of it gets the same reward from `brightness`."""
    return datasets.Dataset.from_list(
        [{"prompt": PROMPTS[i], "number": i, "easy": i in easy} for i in range(count)],
    )


def gray(image):
    """Coarse, so that a pixel that is rounded the other way changes nothing."""
    return round(200 * np.asarray(image.convert("L")).mean() / 255) / 200


def brightness(prompts, images, easy, **columns):
    return [0.5 if is_easy else gray(image) for image, is_easy in zip(images, easy, strict=True)]


def pooled(images):
    """A critic's encoder: 48 means of pixels. Images are decoded as numbers here, so nothing needs to be coarse."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


class Watch(TrainerCallback):
    """Keeps every update's gradient."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.gradients.append(torch.cat([whole(gradient).flatten() for gradient in gradients]))


class Told(TrainerCallback):
    """Gives one process SIGTERM when an update begins."""

    def __init__(self, rank, update):
        self.rank, self.update = rank, update

    def on_step_begin(self, args, state, control, **kwargs):
        if (args.process_index, state.global_step) == (self.rank, self.update):
            os.kill(os.getpid(), signal.SIGTERM)


def make_config(output_dir, method="tp", **kwargs):
    arguments = {
        "num_inference_steps": 3,
        "num_generations": 4,
        "generation_batch_size": 16,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "pipeline_kwargs": {"max_sequence_length": 16},
        "guidance_scale": 2.0,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "check_pipeline": False,
        "beta": 0.0,
        "ema_update_steps": 1,
        "eval_num_inference_steps": 2,
        "num_images_to_save": 4,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if method in ("ddpo", "tdpo_r"):  # on Stable Diffusion, which has no such argument
        arguments["pipeline_kwargs"] = None
    return METHODS[method][0](str(output_dir), **(arguments | kwargs))


def make_trainer(
    output_dir, method="tp", reward_funcs=brightness, pipe=None, full=False, train=None, evaluation=None,
    callbacks=(), lora_alpha=8, optimizers=(None, None), critic_encoder=pooled, **config
):  # fmt: skip
    """A trainer of a small random pipeline; `trainer.watch` keeps the gradients."""
    if pipe is None and method in ("tp", "flow"):
        pipe = pipelines.stable_diffusion_3(t5=False)
    elif pipe is None:
        pipe = pipelines.stable_diffusion()
    peft_config = LoraConfig(r=4, lora_alpha=lora_alpha, init_lora_weights="gaussian", target_modules=TARGETS)
    watch = Watch()
    trainer = METHODS[method][1](
        pipe,
        reward_funcs,
        make_config(output_dir, method, **config),
        train_dataset=prompts() if train is None else train,
        eval_dataset=evaluation,
        callbacks=[watch, *callbacks],
        optimizers=optimizers,
        peft_config=None if full else peft_config,
        **({"critic_encoder": critic_encoder} if method == "tdpo_r" else {}),
    )
    trainer.watch = watch
    return trainer


def weights(trainer):
    return torch.cat([whole(trainer._trained[name]).flatten() for name in sorted(trainer._trained)])


def averages(trainer):
    return torch.cat([whole(trainer.ema.averages[name]).flatten() for name in sorted(trainer.ema.averages)])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def critic_weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.critic.parameters()])


def critic_moments(trainer):
    """Both moments of the critic's Adam, one after the other."""
    states = [trainer.critic_optimizer.state[parameter] for parameter in trainer.critic.parameters()]
    return torch.cat([state[name].flatten() for name in ("exp_avg", "exp_avg_sq") for state in states])


def kept_rewards(trainer):
    """The rewards that the running moments keep of each prompt."""
    return {prompt: list(buffer) for prompt, buffer in trainer.moments.buffers.items()}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@dataclasses.dataclass
class Recorder:
    """The reward `brightness`, which keeps what it saw."""

    images: list = dataclasses.field(default_factory=list)
    rewards: list = dataclasses.field(default_factory=list)
    prompts: list = dataclasses.field(default_factory=list)
    __name__ = "brightness"

    def __call__(self, prompts, images, **columns):
        rewards = brightness(prompts, images, **columns)
        self.images.append(np.stack([np.asarray(image) for image in images]))
        self.rewards.append(np.array(rewards))
        self.prompts.append(prompts)
        return rewards


def joined(calls, trainer):
    """What a reward function saw or gave in each call, as if each generation were one chunk (there are no evaluations)."""
    levels = trainer.args.num_trained_steps + 1 if trainer._needs_completions else 1
    images = trainer.args.generation_batch_size // trainer.accelerator.num_processes
    chunks = -(-images // trainer.args.per_device_rollout_batch_size)
    generations = [calls[first : first + chunks * levels] for first in range(0, len(calls), chunks * levels)]
    return [np.concatenate(calls[level::levels]) for calls in generations for level in range(levels)]


def run(spec):
    """Trains, and returns everything that should not depend on the number of processes."""
    spec = dict(spec)
    resume, easy, told = spec.pop("resume", None), spec.pop("easy", ()), spec.pop("told", None)
    save = spec.pop("save", False)
    recorder = Recorder()
    trainer = make_trainer(
        reward_funcs=recorder,
        train=prompts(easy=easy),
        evaluation=prompts(3) if spec.pop("evaluate", False) else None,
        callbacks=[Told(*told)] if told else [],
        **spec,
    )
    evaluated, start = [], weights(trainer)
    compute_loss = trainer.compute_loss

    def count(model, inputs, **kwargs):
        evaluated.append(not inputs["skip"])
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = count
    try:
        trainer.train(resume_from_checkpoint=resume)
    except SystemExit as error:
        assert told and error.code == 128 + signal.SIGTERM
        return {"updates": trainer.state.global_step}
    if save:
        trainer.save_model()
    history = [
        {name: value for name, value in entry.items() if "time" not in name and "per_second" not in name}
        for entry in trainer.state.log_history
    ]
    more = {}
    if isinstance(trainer, DDPOTrainer):
        more["kept_rewards"] = kept_rewards(trainer)
    if isinstance(trainer, TDPORTrainer) and trainer.args.use_critic:
        more |= {"critic": critic_weights(trainer), "critic_moments": critic_moments(trainer)}
    if trainer.eval_dataset is None:
        recorder.images, recorder.rewards = joined(recorder.images, trainer), joined(recorder.rewards, trainer)
    return more | {
        "images": recorder.images,
        "rewards": recorder.rewards,
        "gradients": trainer.watch.gradients,
        "change": weights(trainer) - start,
        "weights": weights(trainer),
        "averages": averages(trainer) if trainer.ema else None,
        "history": history,
        "evaluated": evaluated,
        "best": trainer.state.best_model_checkpoint,
        "held": sum(local(weight).numel() for weight in trainer._trained.values()) / start.numel(),
    }


if __name__ == "__main__":
    two_processes.main(run)
