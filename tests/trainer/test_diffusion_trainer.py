"""What all trainers of pipelines share, on the trainers of flow models."""

import asyncio
import functools
import gc
import multiprocessing
import os
import signal
import time
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import flow_trl
from flow_trl import TPGRPOConfig, checkpoints
from flow_trl.trainer.diffusion_trainer import sample_generator
from tests import pipelines, two_processes
from tests.trainer.runs import (
    PROMPTS,
    Recorder,
    averages,
    brightness,
    gray,
    logged,
    make_trainer,
    prompts,
    relative,
    run,
    weights,
)


def flat(path):
    """A file of tensors as one vector, in the order of the trainer's."""
    tensors = load_file(path)
    names = sorted(tensors)
    return torch.cat([tensors[name].flatten() for name in names])


def draw(pipe, texts, generators, steps=2, guidance_scale=2.0):
    """Images from a pipeline itself, as arrays of bytes."""
    images = pipe(
        texts, num_inference_steps=steps, guidance_scale=guidance_scale, max_sequence_length=16, generator=generators
    ).images
    return np.stack([np.asarray(image) for image in images]).astype(int)


# Updates


@pytest.mark.parametrize("rollout_size, train_size", [(16, 2), (3, 8), (1, 4), (100, 1)])
def test_ratio_is_one_at_the_first_update_of_a_generation(tmp_path, rollout_size, train_size):
    trainer = make_trainer(
        tmp_path, max_steps=4, per_device_rollout_batch_size=rollout_size, per_device_train_batch_size=train_size
    )
    trainer.train()
    deviations = logged(trainer, "ratio/max_deviation")
    assert max(deviations[0::2]) <= 1e-5
    assert min(deviations[1::2]) > 1e-5


def test_more_passes_over_a_generation(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, reward_funcs=recorder, max_steps=5, num_iterations=2)
    trainer.train()
    deviations = logged(trainer, "ratio/max_deviation")
    assert max(deviations[0], deviations[4]) <= 1e-5 < min(deviations[1:4])
    assert len(recorder.rewards) == 2 * 3  # two generations of three images per trajectory


def test_epochs_take_every_prompt_once(tmp_path):
    seen = []

    def watched(prompts, images, **columns):
        seen.append(prompts)
        return [gray(image) for image in images]

    make_trainer(tmp_path, reward_funcs=watched, method="flow", max_steps=8).train()
    groups = [call[i] for call in seen for i in range(0, 16, 4)]
    assert all(call == [prompt for prompt in call[::4] for _ in range(4)] for call in seen)
    assert sorted(groups[:8]) == sorted(groups[8:]) == sorted(PROMPTS)
    assert groups[:8] != groups[8:]  # shuffled anew


JUMPS = TPGRPOConfig.RECOMMENDED | {"completion_stride": "jump"}
BASE = {
    # One reward for all images of these: in the first generation, all groups of the first of two processes are skipped,
    # in the second generation one of each process.
    "easy": [0, 1, 4, 6],
    "optim": "sgd",
    "learning_rate": 1.0,
    "beta": 0.1,
    "max_steps": 3,
    "shuffle_dataset": False,
}


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    return run({"output_dir": str(tmp_path_factory.mktemp("base")), **BASE})


def assert_same_run(result, expected):
    for images, expected_images in zip(result["images"], expected["images"], strict=True):
        assert np.abs(images.astype(int) - expected_images).max() <= 1
    for rewards, expected_rewards in zip(result["rewards"], expected["rewards"], strict=True):
        np.testing.assert_allclose(rewards, expected_rewards, atol=1e-5)
    assert len(result["gradients"]) == len(expected["gradients"])
    for gradient, expected_gradient in zip(result["gradients"], expected["gradients"], strict=True):
        assert relative(gradient, expected_gradient) < 1e-5
    assert relative(result["change"], expected["change"]) < 1e-5
    assert relative(result["averages"], expected["averages"]) < 1e-5
    for entry, expected_entry in zip(result["history"], expected["history"], strict=True):
        assert entry.keys() == expected_entry.keys()
        for name in entry:
            np.testing.assert_allclose(entry[name], expected_entry[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_base_run_trains(base_run):
    assert all(gradient.norm() > 1e-3 for gradient in base_run["gradients"])
    assert logged_in(base_run, "frac_reward_zero_std") == [0.5, 0.5]
    assert logged_in(base_run, "kl")[0] == 0 and min(logged_in(base_run, "kl")[1:]) > 0


def logged_in(result, name):
    return [entry[name] for entry in result["history"] if name in entry]


@pytest.mark.parametrize("sizes", [(1, 1), (3, 4), (100, 8)])
def test_batch_sizes_do_not_matter(tmp_path, base_run, sizes):
    rollout_size, train_size = sizes
    result = run(
        {
            "output_dir": str(tmp_path),
            "per_device_rollout_batch_size": rollout_size,
            "per_device_train_batch_size": train_size,
            **BASE,
        }
    )
    assert_same_run(result, base_run)


def test_micro_batches_without_a_gradient_are_skipped(base_run):
    # Three updates of 8 images: 4 micro-batches at 2 steps, half of them of the easy prompts.
    assert base_run["evaluated"] == 3 * ([False] * 4 + [True] * 4)


def test_all_groups_skipped(tmp_path):
    trainer = make_trainer(tmp_path, train=prompts(easy=range(8)), optim="sgd", beta=0.1)
    before = weights(trainer)
    trainer.train()
    assert torch.equal(weights(trainer), before)
    assert logged(trainer, "frac_reward_zero_std") == [1.0]


@pytest.fixture(scope="module")
def two_process_runs(tmp_path_factory):
    """Seven runs, one after another, in two processes; what each process saw of them."""
    folder = tmp_path_factory.mktemp("two")
    evaluation = {"evaluate": True, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1}
    saving = {"save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward"}
    adam = {"max_steps": 4, "easy": [0, 1, 4]}
    specs = [
        {"output_dir": str(folder / "sgd"), **BASE, **evaluation},
        {"output_dir": str(folder / "straight"), **adam, **saving, **evaluation, **best},
        {"output_dir": str(folder / "resumed"), **adam, "resume": str(folder / "straight" / "checkpoint-3")},
        {"output_dir": str(folder / "skipped"), "easy": list(range(8)), "beta": 0.1, "max_steps": 3},
        {"output_dir": str(folder / "jumps"), **BASE, **JUMPS},
        {"output_dir": str(folder / "told"), **adam, "told": [1, 2]},
        {"output_dir": str(folder / "told"), **adam, "resume": True},
    ]
    return specs, two_processes.fork(run, specs, folder)


@pytest.mark.parametrize("number", [0, 4], ids=["paper", "jumps"])
def test_two_processes_train_the_same(two_process_runs, base_run, tmp_path, number):
    specs, results = two_process_runs
    first, second = results[number]
    expected = run(specs[number] | {"output_dir": str(tmp_path)})
    assert len(logged_in(expected, "control_variate/beta_2")) == (2 if number == 4 else 0)
    calls = [len(rewards) for rewards in expected["rewards"]]
    joined = {"images": [], "rewards": []}
    for name in joined:
        for size, a, b in zip(calls, first[name], second[name], strict=True):
            if size == 16:  # a generation: the first half of the images is the first process's
                joined[name].append(np.concatenate([a, b]))
    generations = {
        name: [values for size, values in zip(calls, expected[name], strict=True) if size == 16] for name in joined
    }
    assert len(generations["rewards"]) == 6
    assert_same_run({**first, **joined}, {**expected, **generations})
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["averages"], second["averages"])
    # In the first generation the second process needs all its micro-batches, so the first takes part in them.
    assert first["evaluated"] == second["evaluated"] == [True] * 8 + [False] * 2 + [True] * 2
    print("gradients", [relative(a, b) for a, b in zip(first["gradients"], expected["gradients"], strict=True)])
    print("change of the weights", relative(first["change"], expected["change"]))


def test_two_processes_skip_all(two_process_runs):
    for result in two_process_runs[1][3]:
        assert not result["change"].any()
        # Without a gradient too, the processes meet in the last micro-batch of an update
        assert result["evaluated"] == 3 * [False, False, False, True]


def test_two_processes_resume_and_load_the_best(two_process_runs):
    specs, results = two_process_runs
    (straight, other), (resumed, _) = results[1], results[2]
    rewards = logged_in(straight, "eval_reward")
    assert Path(straight["best"]).name == f"checkpoint-{np.argmax(rewards) + 1}"
    assert straight["best"] == other["best"]
    for result, folder in (
        (straight, straight["best"]), (other, straight["best"]), (resumed, f"{specs[1]['output_dir']}/checkpoint-4")
    ):  # fmt: skip
        assert torch.equal(result["weights"], flat(Path(folder) / "trained_weights.safetensors"))
        assert torch.equal(result["averages"], flat(Path(folder) / "ema_weights.safetensors"))


def test_two_processes_of_which_one_is_told_to_end(two_process_runs):
    """Both end after the update, with a checkpoint within a generation; resumed, they are what nobody told."""
    specs, results = two_process_runs
    assert results[5] == ({"updates": 3}, {"updates": 3})
    expected = flat(Path(specs[1]["output_dir"]) / "checkpoint-4" / "trained_weights.safetensors")
    for result in results[6]:
        assert torch.equal(result["weights"], expected)


# Saving and resuming


class Kill(TrainerCallback):
    """Ends the process, as `kill -9` does, when a checkpoint was saved."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def in_another_process(function, *args):
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(120)
    return process.exitcode


SAVING = {
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 6,
    "ema_update_steps": 2,
    "ema_decay": 0.8,
    "beta": 0.1,
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, request):
    """A run that nothing interrupts; its further arguments can be a parameter."""
    config = SAVING | {"save_strategy": "no"} | getattr(request, "param", {})
    trainer = make_trainer(tmp_path_factory.mktemp("straight"), **config)
    trainer.train()
    return trainer


def assert_equal_trainers(trainer, expected):
    assert torch.equal(weights(trainer), weights(expected))
    assert torch.equal(averages(trainer), averages(expected))
    assert not torch.equal(weights(trainer), averages(trainer))
    for name in (
        "total_nfe",
        "total_reward_calls",
        "loss",
        "reward",
        "kl",
        "ratio/max_deviation",
        "control_variate/beta_1",
    ):
        assert logged(trainer, name) == logged(expected, name), name


def test_total_cost(straight):
    # 16 images, 2 + 3 + 1 evaluations, 3 images per trajectory; three generations of two updates
    assert logged(straight, "total_nfe") == [96, 96, 192, 192, 288, 288]
    assert logged(straight, "total_reward_calls") == [48, 48, 96, 96, 144, 144]
    assert logged(straight, "nfe") == [6.0] * 3 and logged(straight, "reward_calls") == [3.0] * 3


@pytest.mark.parametrize(
    "config, straight",
    [({}, {}), (JUMPS, JUMPS)],
    indirect=["straight"],
    ids=["paper", "jumps"],
)
def test_killed_within_a_generation_and_resumed(tmp_path, config, straight):
    config = SAVING | {"save_steps": 3} | config

    def child():
        make_trainer(tmp_path, callbacks=[Kill(3)], **config).train()

    assert in_another_process(child) == -signal.SIGKILL
    resumed = make_trainer(tmp_path, **config)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_trainers(resumed, straight)


def test_resumed_by_the_trainer_that_went_further(tmp_path, straight):
    trainer = make_trainer(tmp_path, **SAVING)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal_trainers(trainer, straight)


@pytest.mark.parametrize("place", ["optimizer", "generation", "weights", "average", "rename"])
def test_killed_while_saving(tmp_path, straight, place):
    def child():
        trainer = make_trainer(tmp_path, callbacks=[], **SAVING)
        owner, name = {
            "optimizer": (trainer, "_save_optimizer_and_scheduler"),
            "generation": (checkpoints.Generation, "save"),
            "weights": (checkpoints, "save_file"),
            "average": (checkpoints, "save_file"),
            "rename": (os, "replace"),
        }[place]
        original = getattr(owner, name)

        def killed(*args, **kwargs):
            target = {"weights": "trained_weights", "average": "ema_weights"}.get(place, "") in str(args[1:])
            if trainer.state.global_step == 3 and target:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, killed)
        trainer.train()

    assert in_another_process(child) == -signal.SIGKILL
    assert Path(get_last_checkpoint(tmp_path)).name == "checkpoint-2"
    resumed = make_trainer(tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_trainers(resumed, straight)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in range(1, 7)}


def test_save_total_limit(tmp_path):
    make_trainer(tmp_path, save_total_limit=2, **SAVING | {"max_steps": 4}).train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-4"}


class Scripted:
    """A reward that says in advance which evaluation is the best."""

    __name__ = "scripted"

    def __init__(self, values):
        self.values = iter(values)

    def __call__(self, prompts, images, number, **columns):
        if len(prompts) == 3:  # an evaluation
            return [next(self.values)] * 3
        return [gray(image) for image in images]


@pytest.mark.parametrize("limit", [None, 1])
def test_best_model_is_loaded_at_the_end(tmp_path, limit):
    seen = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen[state.global_step] = weights(trainer), averages(trainer)

    trainer = make_trainer(
        tmp_path, reward_funcs=Scripted([0.1, 0.5, 0.3, 0.2]), evaluation=prompts(3), callbacks=[Keep()],
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_reward",
        save_total_limit=limit, **SAVING | {"max_steps": 4},
    )  # fmt: skip
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "checkpoint-2"
    assert torch.equal(weights(trainer), seen[2][0]) and torch.equal(averages(trainer), seen[2][1])
    assert not torch.equal(seen[2][0], seen[4][0])
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "| updates | 2 |" in card
    assert "| reward | 0.5000" in card and "images/eval-000002.png" in card
    if limit:
        assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2"}


def test_resuming_a_run_that_kept_the_best(tmp_path):
    config = {
        "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_reward", "evaluation": prompts(3),
    } | SAVING  # fmt: skip
    make_trainer(tmp_path, reward_funcs=Scripted([0.5, 0.1]), **config | {"max_steps": 2}).train()
    trainer = make_trainer(tmp_path, reward_funcs=Scripted([0.2, 0.3]), **config | {"max_steps": 4})
    trainer.train(resume_from_checkpoint=True)
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "checkpoint-1"


def test_the_adapter_depends_on_the_seed_alone(tmp_path):
    first = weights(make_trainer(tmp_path, seed=1))
    torch.rand(7)
    assert torch.equal(weights(make_trainer(tmp_path, seed=1)), first)
    assert not torch.equal(weights(make_trainer(tmp_path, seed=2)), first)


# What users load


def eval_noise(count):
    return [sample_generator("eval", row) for row in range(count)]


def test_saved_lora_gives_the_policy_that_was_evaluated(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path, reward_funcs=recorder, evaluation=prompts(3), save_strategy="steps", save_steps=2, lora_alpha=24,
        learning_rate=0.05, max_steps=3, eval_num_inference_steps=4, eval_guidance_scale=3.0,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.evaluate()
    evaluated = recorder.images[-1]
    with trainer.ema.applied():
        policy = trainer.pipe(
            PROMPTS[:3], num_inference_steps=4, guidance_scale=3.0, max_sequence_length=16, generator=eval_noise(3),
            output_type="np",
        ).images  # fmt: skip
    images = {}
    for folder in (tmp_path, tmp_path / "checkpoint-2", None):
        pipe = pipelines.stable_diffusion_3(t5=False)
        if folder is not None:
            pipe.load_lora_weights(folder)
        images[folder] = pipe(
            PROMPTS[:3], num_inference_steps=4, guidance_scale=3.0, max_sequence_length=16, generator=eval_noise(3),
            output_type="np",
        ).images  # fmt: skip
    assert np.abs(images[tmp_path] - policy).max() < 1e-4
    assert np.abs(255 * images[tmp_path] - evaluated).max() < 1
    assert np.abs(images[None] - policy).max() > 0.01  # it learned something
    assert np.abs(images[tmp_path / "checkpoint-2"] - policy).max() > 1e-4  # the third update
    # Where the average is not switched off, it is not the weights themselves that were saved
    now = trainer.pipe(
        PROMPTS[:3], num_inference_steps=4, guidance_scale=3.0, max_sequence_length=16, generator=eval_noise(3),
        output_type="np",
    ).images  # fmt: skip
    assert np.abs(now - policy).max() > 1e-3


def test_saved_checkpoint_has_the_average_of_its_step(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, learning_rate=0.05, lora_alpha=24)
    trainer.train()
    pipe = pipelines.stable_diffusion_3(t5=False)
    pipe.load_lora_weights(tmp_path / "checkpoint-2")
    with trainer.ema.applied():
        expected = draw(trainer.pipe, PROMPTS[:2], eval_noise(2))
    assert np.abs(draw(pipe, PROMPTS[:2], eval_noise(2)) - expected).max() <= 1


def test_training_on_goes_on_from_a_loaded_lora(tmp_path):
    make_trainer(tmp_path / "first", learning_rate=0.05).train()
    trainer = make_trainer(tmp_path / "second", learning_rate=0.05)
    trainer.train()
    trainer.save_model()
    pipe = pipelines.stable_diffusion_3(t5=False)
    pipe.load_lora_weights(tmp_path / "second")
    on = make_trainer(tmp_path / "on", pipe=pipe, full=True, beta=0.1, max_steps=1)
    assert on.is_lora
    assert torch.equal(weights(on), averages(trainer))
    on.train()
    assert logged(on, "kl")[0] > 0  # the reference is without the adapter
    on.save_model()
    assert (tmp_path / "on" / "pytorch_lora_weights.safetensors").is_file()


def test_full_training_saves_the_pipeline(tmp_path):
    pipe = pipelines.stable_diffusion_3()
    trainer = make_trainer(
        tmp_path / "out", pipe=pipe, full=True, learning_rate=1e-3, save_strategy="steps", save_steps=2
    )
    assert weights(trainer).numel() == sum(p.numel() for p in trainer.pipe.transformer.parameters())
    trainer.train()
    trainer.save_model()
    trainer.save_model(str(tmp_path / "elsewhere"))
    with trainer.ema.applied():
        expected = draw(trainer.pipe, PROMPTS[:2], eval_noise(2))
    for folder in ("out", "elsewhere"):
        loaded = DiffusionPipeline.from_pretrained(tmp_path / folder)
        assert isinstance(loaded, StableDiffusion3Pipeline)
        loaded.set_progress_bar_config(disable=True)
        assert np.array_equal(draw(loaded, PROMPTS[:2], eval_noise(2)), expected)
    assert np.abs(draw(pipelines.stable_diffusion_3(), PROMPTS[:2], eval_noise(2)) - expected).max() > 2
    part = type(trainer.pipe.transformer).from_pretrained(tmp_path / "out" / "checkpoint-2" / "transformer")
    with trainer.ema.applied():
        for name, parameter in trainer.pipe.transformer.named_parameters():
            assert torch.equal(part.get_parameter(name), parameter)


def test_moving_average_of_a_run_in_closed_form(tmp_path):
    seen = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(weights(trainer))

    trainer = make_trainer(tmp_path, callbacks=[Keep()], max_steps=6, ema_decay=0.7, ema_update_steps=2)
    average = weights(trainer)
    trainer.train()
    for values in seen[1::2]:
        average = 0.7 * average + 0.3 * values
    torch.testing.assert_close(averages(trainer), average)


def test_without_moving_average(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, reward_funcs=recorder, evaluation=prompts(2), ema_decay=0.0, learning_rate=0.05)
    assert trainer.ema is None
    trainer.train()
    trainer.evaluate()
    assert np.abs(draw(trainer.pipe, PROMPTS[:2], eval_noise(2)) - recorder.images[-1]).max() <= 1


@pytest.mark.parametrize("full", [False, True])
def test_gradient_checkpointing_gives_the_same_gradient(tmp_path, full):
    results, recomputed = [], []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path, full=full, activation_checkpointing=checkpointing, beta=0.1, optim="sgd", max_steps=2
        )
        calls = []
        trainer.pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
            lambda *args, calls=calls: calls.append(torch.is_grad_enabled())
        )
        trainer.train()
        results.append(trainer.watch.gradients)
        recomputed.append(len(calls))
    for plain, checkpointed in zip(*results, strict=True):
        assert plain.norm() > 1e-4
        assert relative(checkpointed, plain) < 1e-5
    assert recomputed[1] == recomputed[0] + 16  # 2 updates of 4 micro-batches at 2 steps, once more each


@pytest.mark.parametrize("method, beta", [("flow", 0.0), ("flow", 0.1), ("tp", 0.1), ("ddpo", 0.1), ("tdpo_r", 0.1)])
def test_micro_batches_do_not_wait_for_the_device(tmp_path, monkeypatch, method, beta):
    """On the meta device, `.item()`, `.cpu()` and whatever else waits for a device raises."""
    trainer = make_trainer(tmp_path, method=method, beta=beta, max_steps=1)
    trainer.train()
    meta = torch.device("meta")
    monkeypatch.setattr(Accelerator, "device", meta)
    for module in [*trainer.pipe.components.values(), getattr(trainer, "critic", None)]:
        if isinstance(module, torch.nn.Module):
            module.to(meta)
    if method == "tdpo_r":
        trainer._critic_inputs = {name: tensor.to(meta) for name, tensor in trainer._critic_inputs.items()}
    trainer._set_generation(trainer._generation)
    for batch in trainer._micro_batches(0)[:3]:
        trainer.training_step(trainer.model, batch)
    gradients = [weight.grad for weight in trainer.model.parameters() if weight.requires_grad]
    assert gradients and all(gradient.device == meta for gradient in gradients)
    assert any(
        isinstance(value, torch.Tensor) and value.device == meta
        for values in trainer._metrics.values()
        for value in values
    )
    with pytest.raises(RuntimeError):
        torch.ones(1, device=meta).item()


# Generations


STREAM = {"per_device_rollout_batch_size": 6, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("streamed"), **STREAM | {"save_strategy": "no"})
    trainer.train()
    return trainer


def counted_rollouts(trainer):
    """Chunks that are sampled from now on, as the places of their images."""
    chunks, sample = [], trainer._sample

    def counted(step, chunk, *rest):
        chunks.append((step, chunk.first))
        return sample(step, chunk, *rest)

    trainer._sample = counted
    return chunks


@pytest.mark.parametrize("overlap", [True, False])
def test_interrupted_scoring_goes_on_without_sampling_again(tmp_path, streamed, overlap):
    """An error in the second chunk of the second generation, while, if in a thread, the third is sampled beside it."""
    calls = []

    def breaks(prompts, images, **columns):
        calls.append(len(images))
        if len(calls) == 3 * 3 + 3 + 2:  # three images per trajectory
            raise OSError("the judge is away")
        return [gray(image) for image in images]

    trainer = make_trainer(tmp_path, reward_funcs=breaks, overlap_rewards=overlap, **STREAM)
    chunks = counted_rollouts(trainer)
    with pytest.raises(OSError, match="the judge is away") as info:
        trainer.train()
    assert "`breaks`" in "".join(info.value.__notes__) and "checkpoint-2" in "".join(info.value.__notes__)
    sampled = chunks[3:]
    assert sampled == [(2, 0), (2, 6), (2, 12)][: 3 if overlap else 2]
    assert len(list((tmp_path / "_sampled").iterdir())) == len(sampled)

    resumed = make_trainer(tmp_path, reward_timeout=60, overlap_rewards=overlap, **STREAM)
    chunks = counted_rollouts(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert [chunk for chunk in chunks if chunk[0] == 2] == [(2, 0), (2, 6), (2, 12)][len(sampled) :]
    assert torch.equal(weights(resumed), weights(streamed))
    for name in ("total_nfe", "total_reward_calls", "nfe", "loss", "reward", "kl"):
        assert logged(resumed, name)[-2:] == logged(streamed, name)[-2:], name
    assert not (tmp_path / "_sampled").exists()


def test_an_error_before_the_first_update(tmp_path, streamed):
    def broken(prompts, images, **columns):
        raise OSError("the judge is away")

    with pytest.raises(OSError) as info:
        make_trainer(tmp_path, reward_funcs=broken, **STREAM).train()
    assert "start again with the same `output_dir`" in "".join(info.value.__notes__)
    again = make_trainer(tmp_path, **STREAM)
    chunks = counted_rollouts(again)
    again.train()
    assert (0, 0) not in chunks and (0, 12) in chunks
    assert torch.equal(weights(again), weights(streamed))


def test_an_error_while_evaluating_loses_no_update(tmp_path, streamed):
    """The checkpoint that is then written has the trained weights, not their average, which are evaluated."""
    sizes = []

    def breaks(prompts, images, **columns):
        sizes.append(len(images))
        if len(images) == 3:
            raise OSError("the judge is away")
        return [gray(image) for image in images]

    config = STREAM | {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 3}
    with pytest.raises(OSError) as info:
        make_trainer(tmp_path, reward_funcs=breaks, evaluation=prompts(3), **config).train()
    assert "resume from checkpoint-3" in "".join(info.value.__notes__)
    resumed = make_trainer(tmp_path, **STREAM)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), weights(streamed))
    assert torch.equal(averages(resumed), averages(streamed))


def test_killed_while_scoring(tmp_path, streamed):
    def child():
        calls = []

        def killed(prompts, images, **columns):
            calls.append(len(images))
            if len(calls) == 3 * 3 + 3 + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return [gray(image) for image in images]

        make_trainer(tmp_path, reward_funcs=killed, **STREAM).train()

    assert in_another_process(child) == -signal.SIGKILL
    resumed = make_trainer(tmp_path, **STREAM)
    chunks = counted_rollouts(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert {(2, 0), (2, 6)}.isdisjoint(chunks) and (4, 0) in chunks
    assert torch.equal(weights(resumed), weights(streamed))


@pytest.mark.parametrize("change", [{"guidance_scale": 3.0}, {"noise_level": 0.5}, {"seed": 1}, {"lora_alpha": 4}])
def test_samples_of_other_settings_are_not_taken(tmp_path, change):
    def broken(prompts, images, **columns):
        raise OSError

    with pytest.raises(OSError):
        make_trainer(tmp_path, reward_funcs=broken, **STREAM).train()
    assert list((tmp_path / "_sampled").iterdir())
    other = make_trainer(tmp_path, **STREAM | {"max_steps": 1} | change)
    chunks = counted_rollouts(other)
    other.train()
    assert chunks == [(0, 0), (0, 6), (0, 12)]


@pytest.mark.parametrize("method", ["tp", "flow", "tdpo_r"])
def test_the_thread_changes_nothing(tmp_path, method):
    runs = [make_trainer(tmp_path, method=method, overlap_rewards=o, max_steps=3, beta=0.1) for o in (True, False)]
    for trainer in runs:
        trainer.train()
    assert torch.equal(*map(weights, runs))
    assert logged(runs[0], "reward") == logged(runs[1], "reward")


def test_two_chunks_of_images_exist_at_most(tmp_path):
    """Counted by finalizers: pixels of a chunk being scored, those of the next, PIL images of one call."""
    alive, peak = {"pixels": 0, "pil": 0}, {"pixels": 0, "pil": 0}

    def born(kind, thing, count):
        alive[kind] += count
        peak[kind] = max(peak[kind], alive[kind])
        weakref.finalize(thing, lambda: alive.__setitem__(kind, alive[kind] - count))

    calls = []

    def watched(prompts, images, **columns):
        calls.append(len(images))
        for image in images:
            born("pil", image, 1)
        for _ in range(2000):  # until the next chunk, if there is one, is decoded
            if alive["pixels"] == 2 or len(calls) > 15 * 3:
                break
            time.sleep(0.005)
        return [gray(image) for image in images]

    trainer = make_trainer(
        tmp_path, reward_funcs=watched, generation_batch_size=64, per_device_rollout_batch_size=4, max_steps=1,
        train=prompts(8), num_generations=8,
    )  # fmt: skip
    decode = trainer._sampler._decode

    def counted(*args):
        pixels = decode(*args)
        born("pixels", pixels, 1)
        return pixels

    trainer._sampler._decode = counted
    trainer.train()
    gc.collect()
    assert peak == {"pixels": 2, "pil": 4}
    assert alive == {"pixels": 0, "pil": 0}


def test_decoding_in_batches_of_its_own(tmp_path):
    whole, parts = (make_trainer(tmp_path, per_device_decode_batch_size=size, max_steps=1) for size in (None, 5))
    sizes, decode = [], parts.pipe.vae.decode
    parts.pipe.vae.decode = lambda latents, **kwargs: sizes.append(len(latents)) or decode(latents, **kwargs)
    whole.train()
    parts.train()
    assert sizes == [5] * 9 + [3]  # 16 trajectories with three images each
    assert relative(weights(whole), weights(parts)) < 1e-3
    np.testing.assert_allclose(logged(whole, "reward"), logged(parts, "reward"), atol=1e-3)


def test_each_prompt_is_embedded_once(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=8, evaluation=prompts(3))  # 4 generations of 4 prompts, of 8
    asked, encode_prompt = [], type(trainer.pipe).encode_prompt

    @functools.wraps(encode_prompt)
    def counted(self, *args, **kwargs):
        if kwargs["prompt"] is not None:  # else the pipeline hands on embeddings
            asked.append(kwargs["prompt"])
        return encode_prompt(self, *args, **kwargs)

    trainer._sampler.policy._runner_class.encode_prompt = counted
    trainer._eval_sampler.policy._runner_class.encode_prompt = counted
    trainer.train()
    assert sorted(text for texts in asked for text in texts if text in PROMPTS) == sorted(PROMPTS)
    assert len(asked) == 2 + 3  # two generations; "a" and a longer text, alone and together, tell where the rows are
    asked.clear()
    trainer.evaluate()
    trainer.evaluate()
    assert asked[3:] == [PROMPTS[:3]]


def test_resumed_in_the_second_epoch(tmp_path):
    """Prompts that the straight run knows already, and the resumed one does not."""
    config = {"per_device_rollout_batch_size": 6, "max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    straight = make_trainer(tmp_path, **config)
    straight.train()
    resumed = make_trainer(tmp_path, **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert torch.equal(weights(straight), weights(resumed))


def test_offloaded_text_encoders_train_the_same(tmp_path):
    trainers = [make_trainer(tmp_path, offload_text_encoders=offload, max_steps=2) for offload in (False, True)]
    moves, encoder = [], trainers[1].pipe.text_encoder
    to = encoder.to
    encoder.to = lambda device: moves.append(str(device)) or to(device)
    for trainer in trainers:
        trainer.train()
    assert torch.equal(*map(weights, trainers))
    # To the device that encodes, and back: once to find out where the rows are, once for a generation
    assert moves == ["cpu"] * 4


def test_what_trl_gives_reward_functions(tmp_path):
    steps = []

    def by_name(prompts, images, number, easy, trainer_state, log_metric, log_extra):
        steps.append(trainer_state.global_step)
        log_metric("brightest", max(gray(image) for image in images))
        log_extra("gray", [gray(image) for image in images])
        return [gray(image) for image in images]

    def without(prompts, images, number, easy):
        return [0.0] * len(images)

    trainer = make_trainer(
        tmp_path, reward_funcs=[by_name, without], log_completions=True, per_device_rollout_batch_size=6,
        evaluation=prompts(3),
    )  # fmt: skip
    trainer.train()
    assert steps == [0] * 9
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert list(table.columns) == ["step", "prompt", "advantage", "by_name", "without", "gray"]
    assert len(table) == 16 and table["gray"].round(4).tolist() == table["by_name"].round(4).tolist()
    assert set(table["prompt"]) <= set(PROMPTS) and table["advantage"].abs().max() > 0
    assert 0 < logged(trainer, "brightest")[0] < 1
    assert "eval_brightest" in trainer.evaluate()


def test_arguments_have_defaults_named_after_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = Dataset.from_list([{"prompt": f"number {i}", "easy": False} for i in range(48)])
    trainer = flow_trl.TPGRPOTrainer(pipelines.stable_diffusion_3(t5=False), brightness, train_dataset=train)
    assert trainer.args.output_dir == "StableDiffusion3Pipeline-TPGRPO"
    assert trainer.args.num_generations == TPGRPOConfig("out").num_generations


def test_one_image_of_each_prompt_is_shown(tmp_path, capsys):
    options = {"log_completions": True, "log_unique_prompts": True, "num_completions_to_print": None, "max_steps": 1}
    make_trainer(tmp_path, **options).train()
    lines = capsys.readouterr().out.split("4 of the 4 samples of update 1\n")[1].splitlines()[1:5]
    assert len({line.split("  ")[0] for line in lines}) == 4
    assert len(pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")) == 16


def test_failed_rewards_are_counted(tmp_path, caplog):
    calls = []

    def flaky(prompts, images, **columns):
        calls.append(len(images))
        if len(calls) % 3 == 0:
            raise OSError("the judge is away")
        return [gray(image) for image in images]

    trainer = make_trainer(tmp_path, reward_funcs=[brightness, flaky], reward_on_error="none", max_steps=1)
    trainer.train()
    assert logged(trainer, "rewards/flaky/failed") == [pytest.approx(1 / 3)]
    assert not logged(trainer, "rewards/flaky/mean") and not logged(trainer, "rewards/brightness/failed")
    assert "the judge is away" in caplog.text and "16 images have no score" in caplog.text


def test_a_reward_that_never_applies_is_warned_of(tmp_path, caplog):
    def never(prompts, images, **columns):
        return [None] * len(images)

    transformers.utils.logging.enable_propagation()
    make_trainer(tmp_path, reward_funcs=[brightness, never], max_steps=4).train()
    transformers.utils.logging.disable_propagation()
    assert caplog.text.count("`never` gave no score to any image") == 1


# Rewards


def test_columns_and_images_belong_together(tmp_path):
    calls = []

    def watched(prompts, images, number, easy):
        calls.append((prompts, [np.asarray(image).astype(int) for image in images], number))
        return [gray(image) for image in images]

    trainer = make_trainer(tmp_path, reward_funcs=watched, evaluation=prompts(3), max_steps=2)
    trainer.train()
    trainer.evaluate()
    assert len(calls) == 3 + 1
    for texts, images, number in calls:
        assert len(texts) == len(images) == len(number)
        assert texts == [PROMPTS[i] for i in number]
    for texts, _, number in calls[:3]:
        assert (texts, number) == (calls[0][0], calls[0][2])
        assert [number.count(i) for i in set(number)] == [4] * 4
    # The image without noise is the pipeline's own for that prompt and that sample's initial noise
    texts, images, number = calls[0]
    noise = [sample_generator(trainer.args.seed, 0, row, i % 4) for i, row in enumerate(number)]
    expected = draw(pipelines.stable_diffusion_3(t5=False), texts, noise, steps=3)
    assert np.abs(np.stack(images) - expected).max() <= 1


def test_rewards_are_weighted(tmp_path):
    def red(prompts, images, **columns):
        return [np.asarray(image)[..., 0].mean() / 255 for image in images]

    def constant(prompts, images, **columns):
        return torch.full((len(images),), 3.0)

    recorder = Recorder()
    trainer = make_trainer(
        tmp_path, reward_funcs=[recorder, red, constant], reward_weights=[2.0, -1.0, 0.5], max_steps=1
    )
    kept = []
    advantages = trainer._advantages
    trainer._advantages = lambda scores, *rest: (
        kept.append(trainer.scorer.weighted(scores)) or advantages(scores, *rest)
    )
    trainer.train()
    reds = np.stack([red(None, images) for images in recorder.images])
    np.testing.assert_allclose(kept[0].T, 2 * np.stack(recorder.rewards) - reds + 1.5, atol=1e-6)
    expected = {
        "reward": kept[0][:, -1].mean().item(),
        "reward_std": kept[0][:, -1].view(4, 4).std(dim=1).mean().item(),
        "rewards/brightness/mean": recorder.rewards[-1].mean(),
        "rewards/brightness/std": recorder.rewards[-1].std(),
        "rewards/red/mean": reds[-1].mean(),
        "rewards/constant/mean": 3.0,
        "rewards/constant/std": 0.0,
    }
    for name, value in expected.items():
        assert logged(trainer, name) == [pytest.approx(value, abs=1e-6)], name


def test_weight_zero_only_watches(tmp_path):
    sizes = []

    def watched(prompts, images, **columns):
        sizes.append(len(images))
        return np.random.rand(len(images)).tolist()

    alone = make_trainer(tmp_path, max_steps=2)
    alone.train()
    both = make_trainer(
        tmp_path, reward_funcs=[brightness, watched], reward_weights=[1.0, 0.0], evaluation=prompts(3), max_steps=2
    )
    both.train()
    assert torch.equal(weights(alone), weights(both))
    assert sizes == [16]  # the finished images of one generation, no completions
    assert logged(both, "reward") == logged(alone, "reward")
    assert len(logged(both, "rewards/watched/mean")) == 1
    metrics = both.evaluate()
    assert metrics["eval_reward"] == metrics["eval_rewards/brightness/mean"]
    assert "eval_rewards/watched/mean" in metrics


def test_async_rewards_run_concurrently_beside_sync_ones(tmp_path):
    barriers = []

    async def meet(images):
        async with asyncio.timeout(10):  # one after the other, the first would wait for ever
            await barriers[-1].wait()
        return [gray(image) for image in images]

    async def one(prompts, images, **columns):
        if not barriers or barriers[-1].n_waiting == 0:
            barriers.append(asyncio.Barrier(2))
        return await meet(images)

    async def two(prompts, images, **columns):
        return await meet(images)

    asynchronous = make_trainer(tmp_path, reward_funcs=[one, brightness, two])
    asynchronous.train()

    def thrice(prompts, images, **columns):
        return [3 * gray(image) for image in images]

    synchronous = make_trainer(tmp_path, reward_funcs=thrice)
    synchronous.train()
    assert relative(weights(asynchronous), weights(synchronous)) < 1e-5
    for name in ("one", "brightness", "two"):
        assert logged(asynchronous, f"rewards/{name}/mean") == logged(asynchronous, "rewards/one/mean")


def test_async_rewards_in_a_running_loop(tmp_path):
    async def one(prompts, images, **columns):
        return [gray(image) for image in images]

    async def notebook():
        make_trainer(tmp_path, reward_funcs=one, max_steps=1).train()

    asyncio.run(notebook())


def test_none_is_not_applicable(tmp_path):
    def some(prompts, images, number, **columns):
        return [None if i % 2 else gray(image) for i, image in zip(number, images, strict=True)]

    def never(prompts, images, **columns):
        return [None] * len(images)

    def instead(prompts, images, number, **columns):
        return [gray(image) if i % 2 else 0.0 for i, image in zip(number, images, strict=True)]

    trainer = make_trainer(tmp_path, reward_funcs=[some, never, instead], shuffle_dataset=False)
    trainer.train()
    plain = make_trainer(tmp_path, shuffle_dataset=False)
    plain.train()
    assert torch.equal(weights(trainer), weights(plain))
    assert logged(trainer, "reward") == logged(plain, "reward")
    assert not logged(trainer, "rewards/never/mean")
    # `some` is averaged over the images to which it applies
    recorder = Recorder()
    make_trainer(tmp_path, reward_funcs=recorder, shuffle_dataset=False).train()
    applies = recorder.rewards[2].reshape(4, 4)[::2]
    assert logged(trainer, "rewards/some/mean") == [pytest.approx(applies.mean(), abs=1e-6)]


def test_a_group_to_which_nothing_applies_is_skipped(tmp_path):
    def some(prompts, images, number, **columns):
        return [None if i < 2 else gray(image) for i, image in zip(number, images, strict=True)]

    trainer = make_trainer(tmp_path, reward_funcs=some, shuffle_dataset=False)
    trainer.train()
    assert logged(trainer, "frac_reward_zero_std") == [0.5]


# Evaluation


def test_evaluation_metrics(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, reward_funcs=recorder, evaluation=prompts(5))
    metrics = trainer.evaluate()
    rewards = np.concatenate(recorder.rewards)
    assert [len(images) for images in recorder.images] == [4, 1]
    se = rewards.std() / 5**0.5
    expected = {"eval_reward": rewards.mean(), "eval_reward_se": se}
    for name, value in {"mean": rewards.mean(), "std": rewards.std(), "se": se}.items():
        expected[f"eval_rewards/brightness/{name}"] = value
    assert metrics.keys() == expected.keys() | {"eval_runtime"}
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-6), name
    assert trainer.state.log_history[-1].items() >= metrics.items()


@pytest.mark.parametrize("size", [1, 2, 100])
def test_evaluation_does_not_depend_on_the_batch_size(tmp_path, size):
    images = []
    for per_device in (4, size):
        recorder = Recorder()
        trainer = make_trainer(
            tmp_path, reward_funcs=recorder, evaluation=prompts(5), per_device_eval_batch_size=per_device
        )
        trainer.evaluate()
        images.append(np.concatenate(recorder.images).astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1
    expected = draw(pipelines.stable_diffusion_3(t5=False), PROMPTS[:5], eval_noise(5))
    assert np.abs(images[0] - expected).max() <= 1


def test_several_evaluation_sets(tmp_path):
    sets = {"short": prompts(2), "long": prompts(5)}
    trainer = make_trainer(
        tmp_path, evaluation=sets, eval_strategy="steps", eval_steps=2, eval_on_start=True, max_steps=2
    )
    trainer.train()
    for name in sets:
        assert len(logged(trainer, f"eval_{name}_reward")) == 2
        assert (tmp_path / "images" / f"eval_{name}-000002.png").is_file()
    assert logged(trainer, "eval_short_reward")[1] == trainer.evaluate(sets["short"])["eval_reward"]


@pytest.mark.parametrize("count, size", [(3, (48, 16)), (9, (128, 32)), (0, None)])
def test_grid_of_an_evaluation(tmp_path, count, size):
    recorder = Recorder()
    data = Dataset.from_list([{"prompt": PROMPTS[i % 8], "easy": False} for i in range(10)])
    trainer = make_trainer(tmp_path, reward_funcs=recorder, evaluation=data, num_images_to_save=count)
    trainer.evaluate()
    path = tmp_path / "images" / "eval-000000.png"
    if size is None:
        assert not path.exists()
        return
    grid = np.asarray(Image.open(path))
    assert grid.shape[1::-1] == size
    for i, image in enumerate(np.concatenate(recorder.images)[:count]):
        row, column = divmod(i, min(8, count))
        assert np.array_equal(grid[16 * row : 16 * row + 16, 16 * column : 16 * column + 16], image)


def test_grids_of_training_images(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path, reward_funcs=recorder, max_steps=3, log_completions=True, save_strategy="steps", save_steps=1
    )
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "images").glob("*.png")) == [
        "train-000001.png",
        "train-000003.png",
    ]
    grid = np.asarray(Image.open(tmp_path / "images" / "train-000003.png"))
    assert np.array_equal(grid, np.concatenate(recorder.images[-1][:4], axis=1))  # finished images
    # a generation that was begun before the run was stopped leaves no grid
    make_trainer(tmp_path, max_steps=4, log_completions=True).train(str(tmp_path / "checkpoint-3"))


def test_learning_curve_of_a_run(tmp_path):
    pytest.importorskip("matplotlib")
    from flow_trl.callbacks import LearningCurveCallback

    make_trainer(
        tmp_path, evaluation=prompts(2), eval_strategy="steps", eval_steps=1, callbacks=[LearningCurveCallback()]
    ).train()
    assert Image.open(tmp_path / "learning_curve.png").size == (528, 432)


def test_metrics_of_an_update(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.1)
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    update = {"loss", "grad_norm", "learning_rate", "kl", "ratio/max_deviation", "time/update", "epoch", "step"}
    update |= {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
    update |= {"total_nfe", "total_reward_calls"}
    generation = {"reward", "reward_std", "rewards/brightness/mean", "rewards/brightness/std", "frac_reward_zero_std"}
    generation |= {"ratio/first_max_deviation", "clip_ratio/first_update"}
    generation |= {"nfe", "reward_calls", "time/sampling", "time/decoding", "time/reward", "time/reward_wait"}
    generation |= {f"{name}/step_{k}" for name in ("turning_points", "incremental_reward") for k in (1, 2)}
    assert second.keys() == update
    assert first.keys() == update | generation


# The card


def test_model_card(tmp_path):
    def flat_reward(prompts, images, **columns):
        return [0.25] * len(images)

    pipe = pipelines.stable_diffusion_3(t5=False)
    pipe.register_to_config(_name_or_path="someone/small-flow")
    trainer = make_trainer(
        tmp_path / "my-lora", pipe=pipe, reward_funcs=[brightness, flat_reward], reward_weights=[1.0, 0.5],
        evaluation=prompts(3), eval_strategy="steps", eval_steps=2, eval_on_start=True, hub_model_id="me/my-lora",
        learning_rate=0.05, seed=7,
    )  # fmt: skip
    trainer.train()
    trainer.create_model_card(dataset_name="me/prompts", tags="toy")
    trainer.create_model_card()  # as a push does it; what was said before is kept
    card = ModelCard.load(tmp_path / "my-lora" / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/small-flow", "adapter")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    assert card.data.datasets == "me/prompts"
    assert card.data.metrics == ["reward", "brightness", "flat_reward"]
    assert {"lora", "flow-trl", "TP-GRPO", "toy"} <= set(card.data.tags)
    before, after = logged(trainer, "eval_reward")
    first, last = logged(trainer, "eval_reward_se")
    assert before != after
    assert card.data.model_name == "my-lora"
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["reward"].metric_value == after and results["reward"].metric_args == {"standard_error": last}
    assert results["flat_reward"].metric_value == 0.25
    assert (results["reward"].task_type, results["reward"].dataset_name) == ("text-to-image", "held-out prompts")
    assert [entry["text"] for entry in card.data.widget] == PROMPTS[:3]
    grid = Image.open(tmp_path / "my-lora" / "images" / "eval-000002.png")
    for number, entry in enumerate(card.data.widget):
        shown = Image.open(tmp_path / "my-lora" / entry["output"]["url"])
        assert shown.tobytes() == grid.crop((16 * number, 0, 16 * number + 16, 16)).tobytes()
    for text in (
        "# my-lora",
        "trained with TP-GRPO",
        "2602.06422",
        "`TPGRPOTrainer`",
        "<Gallery />",
        'pipe = StableDiffusion3Pipeline.from_pretrained("someone/small-flow", text_encoder_3=None, tokenizer_3=None)',
        'pipe.load_lora_weights("me/my-lora")',
        f"| reward | {before:.4f} ± {first:.4f} | {after:.4f} ± {last:.4f} |",
        "| flat_reward | 0.2500 ± 0.0000 | 0.2500 ± 0.0000 |",
        "`brightness` 1.0, `flat_reward` 0.5",
        "| updates | 2 |",
        "| learning_rate | 0.05 |",
        "| seed | 7 |",
        "| credit | consistent |",
        "| LoRA rank, alpha | 4, 8 |",
        "| denoiser evaluations | 96 |",
        "| scored images | 48 |",
        "| hours |",
        "| hardware | 1 x CPU",
        "![Before and after, the same prompts and noise](before_after.png)",
        f"flow-trl {flow_trl.__version__}",
        "@misc{",
    ):
        assert text in card.text, text
    assert Image.open(tmp_path / "my-lora" / "before_after.png").width > 400


def test_a_single_evaluation_is_not_shown_as_before(tmp_path):
    trainer = make_trainer(tmp_path / "run", evaluation=prompts(2), eval_strategy="steps", eval_steps=2)
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "run" / "README.md").text
    assert "| reward | after |" in card and "before" not in card.split("## Training")[0]
    assert "![Samples](images/eval-000002.png)" in card and not (tmp_path / "run" / "before_after.png").exists()


def test_model_card_of_a_run_without_evaluation(tmp_path):
    trainer = make_trainer(tmp_path / "full", method="flow", full=True, learning_rate=1e-4)
    trainer.create_model_card()
    assert "Not measured." in ModelCard.load(tmp_path / "full" / "README.md").text
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "full" / "README.md")
    assert "last training generation; nothing was held out" in card.text and "LoRA" not in card.text
    assert "2505.05470" in card.text and f'StableDiffusion3Pipeline.from_pretrained("{tmp_path / "full"}"' in card.text
    assert "lora" not in card.data.tags and card.data.eval_results is None


@pytest.mark.parametrize("max_steps, update_steps, share", [(2, 8, 100), (20, 8, 81), (80, 8, None), (2, 1, 81)])
def test_an_average_of_hardly_trained_weights_is_warned_of(tmp_path, caplog, max_steps, update_steps, share):
    trainer = make_trainer(tmp_path, max_steps=max_steps, ema_update_steps=update_steps)
    trainer.state.max_steps = max_steps
    trainer.ema.on_train_begin(trainer.args, trainer.state, trainer.control)
    if share is None:
        assert "ema_decay" not in caplog.text
    else:
        assert f"are to {share}% those from before training. Set `ema_decay=0`" in caplog.text


class Restless(torch.nn.Module):
    """A denoiser's module whose output changes from call to call."""

    def __init__(self, inner, scale):
        super().__init__()
        self.inner, self.scale, self.calls = inner, scale, 0

    def forward(self, *args):
        self.calls += 1
        return self.inner(*args) * (1 + self.scale * self.calls)


def not_asked(prompts, images, **columns):
    raise AssertionError("nothing is scored before the pipeline is checked")


def test_a_pipeline_that_samples_something_else_is_not_trained(tmp_path):
    pipe = pipelines.stable_diffusion_3(t5=False)  # whose scheduler adds noise, which the ODE of a policy does not
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, stochastic_sampling=True)
    trainer = make_trainer(tmp_path, reward_funcs=not_asked, pipe=pipe, check_pipeline=True)
    started = weights(trainer)
    with pytest.raises(ValueError, match="samples other latents.* differ by .*`check_pipeline=False`"):
        trainer.train()
    assert torch.equal(weights(trainer), started)


@pytest.mark.parametrize("method", ["tp", "ddpo"])
def test_a_denoiser_that_is_random_is_not_trained(tmp_path, method):
    trainer = make_trainer(tmp_path, method, reward_funcs=not_asked, check_pipeline=True)
    denoiser = trainer.policy.denoiser
    name = "proj_out" if hasattr(denoiser, "proj_out") else "conv_out"
    setattr(denoiser, name, Restless(getattr(denoiser, name), 0.1))
    with pytest.raises(ValueError, match="predicts another velocity or noise each time"):
        trainer.train()


@pytest.mark.parametrize("method", ["tp", "flow", "ddpo", "tdpo_r"])
def test_the_check_changes_nothing_and_is_logged(tmp_path, method):
    trainers = [
        make_trainer(tmp_path / str(check), method, check_pipeline=check, max_steps=1) for check in (True, False)
    ]
    for trainer in trainers:
        trainer.train()
    assert logged(trainers[0], "check_pipeline/max_deviation") == [0.0]
    assert logged(trainers[1], "check_pipeline/max_deviation") == []
    assert torch.equal(*map(weights, trainers))
    assert logged(trainers[0], "total_nfe") == logged(trainers[1], "total_nfe")


def test_a_ratio_that_is_not_one_ends_the_training(tmp_path):
    trainer = make_trainer(tmp_path, updates_per_generation=2, max_steps=4, check_pipeline=False)
    started = weights(trainer)
    trainer.policy.denoiser.proj_out = Restless(trainer.policy.denoiser.proj_out, 0.1)
    with pytest.raises(RuntimeError, match="first update of a generation a probability ratio is .* away from 1"):
        trainer.train()
    assert torch.equal(weights(trainer), started)  # before the optimizer's step


def test_samples_that_are_clipped_at_the_first_update_are_said_once(tmp_path, caplog):
    trainer = make_trainer(tmp_path, epsilon=1e-12, max_steps=3, check_pipeline=False)
    trainer.policy.denoiser.proj_out.register_forward_hook(
        lambda module, given, output: output * (1 + 1e-4) if torch.is_grad_enabled() else output
    )
    trainer.train()
    shares, deviations = logged(trainer, "clip_ratio/first_update"), logged(trainer, "ratio/first_max_deviation")
    assert shares == pytest.approx(logged(trainer, "clip_ratio/region_mean")[::2]) and min(shares) > 0.01
    assert deviations == pytest.approx(logged(trainer, "ratio/max_deviation")[::2]) and min(deviations) > 0
    (said,) = [record.message for record in caplog.records if "At the first update" in record.message]
    assert "clipped by `epsilon=1e-12`" in said and f"Set `epsilon={10 * deviations[0]:.0e}` or more" in said


# Compiled


def files_without_wrappers(folder):
    """The names of all weights in a folder's safetensors files."""
    paths = sorted(folder.rglob("*.safetensors"))
    names = [name for path in paths for name in load_file(path)]
    assert len(paths) > 2 and not [name for name in names if "_orig_mod" in name or name.startswith("module.")]
    return names


@pytest.mark.parametrize("method", ["flow", "ddpo"])
def test_blocks_are_compiled_in_place(tmp_path, method):
    names = list(make_trainer(tmp_path, method)._trained)
    trainer = make_trainer(tmp_path, method, torch_compile=True, torch_compile_backend="eager")
    modules = list(trainer.policy.denoiser.modules())
    compiled = {type(module).__name__ for module in modules if module._compiled_call_impl is not None}
    assert compiled == {{"flow": "JointTransformerBlock", "ddpo": "BasicTransformerBlock"}[method]}
    assert list(trainer._trained) == names
    assert trainer.accelerator.state.dynamo_plugin.backend == "NO"  # accelerate wraps nothing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "backend", "full", "tolerance"),
    [("flow", "eager", False, 0), ("ddpo", "eager", True, 0), ("flow", "inductor", False, 1e-3)],
)
def test_compiled(tmp_path, method, backend, full, tolerance):
    """What samples, evaluates and trains is compiled, ratios are 1, and what is saved is what an uncompiled run saves."""
    trainers = []
    for name, options in {"plain": {}, "compiled": {"torch_compile": True, "torch_compile_backend": backend}}.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = {
            "max_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            "learning_rate": 1e-3,
            "ema_decay": 0.0,
            "full": full,
        }
        trainer = make_trainer(tmp_path / name, method, evaluation=prompts(2), **config, **options)
        compiled = [torch._dynamo.utils.counters["stats"]["unique_graphs"]]
        for part in (trainer.evaluate, trainer.train):
            part()
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert compiled == [0, 0, 0] if name == "plain" else compiled[0] < compiled[1] < compiled[2]
        trainer.save_model()
        trainers.append(trainer)
    plain, compiled = trainers
    assert logged(compiled, "ratio/first_max_deviation")[0] <= 1e-5
    assert relative(weights(compiled), weights(plain)) <= tolerance
    assert files_without_wrappers(tmp_path / "compiled") == files_without_wrappers(tmp_path / "plain")
    if not full:
        pipe = pipelines.stable_diffusion_3(t5=False)
        pipe.load_lora_weights(tmp_path / "compiled")
        loaded = get_peft_model_state_dict(pipe.transformer, adapter_name="default_0")
        trained = get_peft_model_state_dict(compiled.pipe.transformer)
        assert loaded.keys() == trained.keys() and all(torch.equal(loaded[key], trained[key]) for key in trained)
