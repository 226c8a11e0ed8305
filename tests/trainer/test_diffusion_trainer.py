"""What all trainers of pipelines share, on the trainers of flow models."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from flow_trl.trainer import diffusion_trainer
from tests.trainer.runs import (
    PROMPTS,
    Recorder,
    averages,
    gray,
    logged,
    make_trainer,
    prompts,
    run,
    weights,
)


ROOT = Path(__file__).parents[2]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


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
def two_processes(tmp_path_factory):
    """Four runs, one after another, in two processes; what each process saw of them."""
    folder = tmp_path_factory.mktemp("two")
    evaluation = {"evaluate": True, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1}
    saving = {"save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward"}
    adam = {"max_steps": 4, "easy": [0, 1, 4]}
    specs = [
        {"output_dir": str(folder / "sgd"), **BASE, **evaluation},
        {"output_dir": str(folder / "straight"), **adam, **saving, **evaluation, **best},
        {"output_dir": str(folder / "resumed"), **adam, "resume": str(folder / "straight" / "checkpoint-3")},
    ]
    (folder / "spec.json").write_text(json.dumps(specs))
    # With `--cpu`, accelerate would start one process only; `use_cpu=True` of the trainer is what counts.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(ROOT / "tests" / "trainer" / "runs.py"), str(folder / "spec.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    ranks = [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in (0, 1)]
    return specs, list(zip(*ranks, strict=True))


def test_two_processes_train_the_same(two_processes, base_run, tmp_path):
    specs, results = two_processes
    first, second = results[0]
    expected = run(specs[0] | {"output_dir": str(tmp_path)})
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


def test_two_processes_resume_and_load_the_best(two_processes):
    specs, results = two_processes
    (straight, other), (resumed, _) = results[1], results[2]
    rewards = logged_in(straight, "eval_reward")
    assert Path(straight["best"]).name == f"checkpoint-{np.argmax(rewards) + 1}"
    assert straight["best"] == other["best"]
    for result, folder in (
        (straight, straight["best"]), (other, straight["best"]), (resumed, f"{specs[1]['output_dir']}/checkpoint-4")
    ):  # fmt: skip
        assert torch.equal(result["weights"], flat(Path(folder) / "trained_weights.safetensors"))
        assert torch.equal(result["averages"], flat(Path(folder) / "ema_weights.safetensors"))


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
def straight(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("straight"), **(SAVING | {"save_strategy": "no"}))
    trainer.train()
    return trainer


def assert_equal_trainers(trainer, expected):
    assert torch.equal(weights(trainer), weights(expected))
    assert torch.equal(averages(trainer), averages(expected))
    assert not torch.equal(weights(trainer), averages(trainer))
    for name in ("total_nfe", "total_reward_calls", "loss", "reward", "kl", "ratio/max_deviation"):
        assert logged(trainer, name) == logged(expected, name), name


def test_total_cost(straight):
    # 16 images, 2 + 3 + 1 evaluations, 3 images per trajectory; three generations of two updates
    assert logged(straight, "total_nfe") == [96, 96, 192, 192, 288, 288]
    assert logged(straight, "total_reward_calls") == [48, 48, 96, 96, 144, 144]
    assert logged(straight, "nfe") == [6.0] * 3 and logged(straight, "reward_calls") == [3.0] * 3


def test_killed_within_a_generation_and_resumed(tmp_path, straight):
    def child():
        make_trainer(tmp_path, callbacks=[Kill(3)], **SAVING | {"save_steps": 3}).train()

    assert in_another_process(child) == -signal.SIGKILL
    resumed = make_trainer(tmp_path, **SAVING | {"save_steps": 3})
    resumed.train(resume_from_checkpoint=True)
    assert_equal_trainers(resumed, straight)


@pytest.mark.parametrize("place", ["optimizer", "generation", "weights", "average", "rename"])
def test_killed_while_saving(tmp_path, straight, place):
    def child():
        trainer = make_trainer(tmp_path, callbacks=[], **SAVING)
        owner, name = {
            "optimizer": (trainer, "_save_optimizer_and_scheduler"),
            "generation": (diffusion_trainer.Generation, "save"),
            "weights": (diffusion_trainer, "save_file"),
            "average": (trainer.ema, "save"),
            "rename": (os, "replace"),
        }[place]
        original = getattr(owner, name)

        def killed(*args, **kwargs):
            target = "trained_weights" in str(args[1]) if place == "weights" else True
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


def test_a_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match="trained_weights"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_adapter_depends_on_the_seed_alone(tmp_path):
    first = weights(make_trainer(tmp_path, seed=1))
    torch.rand(7)
    assert torch.equal(weights(make_trainer(tmp_path, seed=1)), first)
    assert not torch.equal(weights(make_trainer(tmp_path, seed=2)), first)
