"""Checkpoints: a run goes on from a whole one of its own, or is told what is wrong with it."""

import copy
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from flow_trl.checkpoints import checkpoints_of, damage, seal
from tests import pipelines
from tests.trainer import text_runs
from tests.trainer.runs import averages, logged, make_trainer, prompts, weights


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "ema_decay": 0.8, "beta": 0.1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with three checkpoints: within a generation, at its end, and within the next."""
    trainer = make_trainer(tmp_path_factory.mktemp("saved"), **SAVING)
    trainer.train()
    return Path(trainer.args.output_dir)


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


def refused(trainer, checkpoint, *words):
    started = weights(trainer)
    with pytest.raises(ValueError) as info:
        trainer.train(resume_from_checkpoint=checkpoint)
    missing = [word for word in words if word not in str(info.value)]
    assert not missing, f"{missing} not in: {info.value}"
    assert torch.equal(weights(trainer), started)


# Settings


CHANGES = [
    ({"guidance_scale": 3.0}, ["`guidance_scale` was 2.0, now 3.0"]),
    ({"noise_level": 0.5}, ["`noise_level` was 0.7, now 0.5"]),
    ({"sde_type": "cps"}, ["`sde_type` was 'sde', now 'cps'"]),
    ({"num_inference_steps": 4}, ["`num_inference_steps` was 3, now 4"]),
    ({"pipeline_kwargs": {"max_sequence_length": 16, "height": 32}}, ["`pipeline_kwargs` was {'max_", "'height': 32"]),
    ({"generation_batch_size": 32}, ["`generation_batch_size` was 16, now 32"]),
    ({"num_generations": 8}, ["`num_generations` was 4, now 8"]),
    ({"credit": "outcome"}, ["`credit` was 'consistent', now 'outcome'"]),
    ({"ema_decay": 0.0}, ["`ema_decay` was 0.8, now 0.0"]),
    ({"weight_decay": 0.1}, ["`weight_decay` was 0.0, now 0.1"]),
    ({"seed": 1}, ["`seed` was 42, now 1"]),
    ({"optim": "sgd"}, ["`optim` was 'adamw", "now 'sgd'"]),
    ({"per_device_train_batch_size": 4}, ["within a generation", "`per_device_train_batch_size` was 2, now 4"]),
]


def test_settings_that_change_what_is_trained_are_refused(saved):
    trainer = make_trainer(saved, **SAVING)
    args = trainer.args
    for change, words in CHANGES:
        trainer.args = copy.copy(args)
        vars(trainer.args).update(change)
        refused(trainer, str(saved / "checkpoint-1"), "by a run with other settings", *words)


def other_base():
    pipe = pipelines.stable_diffusion_3(t5=False)
    with torch.no_grad():
        next(pipe.vae.parameters()).add_(1.0)
    return pipe


def other_scheduler():
    pipe = pipelines.stable_diffusion_3(t5=False)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=1.5)
    return pipe


OTHERS = {
    "method": (lambda: {"method": "flow"}, ["`trainer` was 'TPGRPOTrainer', now 'FlowGRPOTrainer'"]),
    "alpha": (lambda: {"lora_alpha": 24}, ["`peft_config.lora_alpha` was 8, now 24"]),
    "full": (lambda: {"full": True}, ["`peft_config.peft_type` was 'LORA', now None"]),
    "prompts": (lambda: {"train": Dataset.from_list([*prompts()][::-1])}, ["`train_dataset` was '8 rows, "]),
    "base": (lambda: {"pipe": other_base()}, ["`base_weights` was '"]),
    "scheduler": (lambda: {"pipe": other_scheduler()}, ["`scheduler` was {", "'shift': 1.5"]),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_run_s_checkpoint_is_refused(saved, tmp_path, other):
    change, words = OTHERS[other]
    refused(make_trainer(tmp_path, **SAVING | change()), str(saved / "checkpoint-1"), *words)


class Faster(TrainerCallback):
    """Another learning rate from an update on."""

    def on_step_end(self, args, state, control, optimizer, lr_scheduler, **kwargs):
        if state.global_step == 1:
            lr_scheduler.base_lrs = [0.1] * len(optimizer.param_groups)
            for group in optimizer.param_groups:
                group["lr"] = 0.1


def test_another_learning_rate_is_applied_and_said(saved, tmp_path, caplog):
    straight = make_trainer(tmp_path, callbacks=[Faster()], **SAVING | {"save_strategy": "no"})
    straight.train()
    resumed = make_trainer(tmp_path, **SAVING | {"learning_rate": 0.1, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(saved / "checkpoint-1"))
    assert logged(resumed, "learning_rate") == [0.01, 0.1, 0.1]
    assert torch.equal(weights(resumed), weights(straight)) and torch.equal(averages(resumed), averages(straight))
    assert "`learning_rate` was 0.01, now 0.1." in caplog.text


def test_another_schedule_is_applied_at_its_place(saved, tmp_path):
    schedule = {"lr_scheduler_type": "linear", "max_steps": 4, "save_strategy": "no"}
    resumed = make_trainer(tmp_path, **SAVING | schedule)
    resumed.train(resume_from_checkpoint=str(saved / "checkpoint-2"))
    assert logged(resumed, "learning_rate") == pytest.approx([0.01, 0.01, 0.005, 0.0025])


def test_who_does_what_may_change_between_generations(saved, tmp_path, caplog):
    changes = {"per_device_train_batch_size": 4, "per_device_rollout_batch_size": 8}
    resumed = make_trainer(tmp_path, **SAVING | changes)
    resumed.train(resume_from_checkpoint=str(saved / "checkpoint-2"))
    for words in ("`per_device_train_batch_size` was 2, now 4", "`per_device_rollout_batch_size` was 16, now 8"):
        assert words in caplog.text


# Files


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "missing": (Path.unlink, "is missing"),
    "flipped bit": (flip, "is damaged"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, not"),
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes, not"),
}


def test_every_file_that_is_damaged_is_named(copied):
    folder = copied / "checkpoint-1"
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.name != "manifest.json"]
    expected = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "trained_weights.safetensors"}
    expected |= {"ema_weights.safetensors", "generation_0.safetensors", "run.json", "pytorch_lora_weights.safetensors"}
    assert {str(path) for path in files} == expected
    for path in files:
        for spoil, words in DAMAGES.values():
            content = (folder / path).read_bytes()
            spoil(folder / path)
            wrong = damage(folder)
            assert f"`{path}`" in wrong and words in wrong, wrong
            (folder / path).write_bytes(content)
    assert damage(folder) is None
    for content in (b"", b"{", b"[]", b'{"files": 3}'):
        (folder / "manifest.json").write_bytes(content)
        assert damage(folder) == "its file `manifest.json` is damaged"


def test_a_damaged_checkpoint_is_not_read(copied):
    trainer = make_trainer(copied, **SAVING)
    for name, (spoil, words) in zip(
        ("optimizer.pt", "trained_weights.safetensors", "generation_0.safetensors", "scheduler.pt"),
        DAMAGES.values(),
        strict=True,
    ):
        path = copied / "checkpoint-1" / name
        content = path.read_bytes()
        spoil(path)
        refused(trainer, str(copied / "checkpoint-1"), str(copied / "checkpoint-1"), f"`{name}`", words)
        path.write_bytes(content)


def test_the_newest_whole_checkpoint_is_taken(copied, saved, tmp_path, caplog):
    flip(copied / "checkpoint-3" / "optimizer.pt")
    (copied / "checkpoint-2" / "manifest.json").unlink()
    (copied / "checkpoint-10").mkdir()
    resumed = make_trainer(copied, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    for words in (
        "goes on from " + str(copied / "checkpoint-1"),
        "checkpoint-3: its file `optimizer.pt` is damaged",
        "checkpoint-2: it has no file `manifest.json`",
        "checkpoint-10: it has no file",
    ):
        assert words in caplog.text
    for step in (2, 3):  # written anew, as they were
        for name in ("trained_weights.safetensors", "ema_weights.safetensors"):
            ours, theirs = (load_file(folder / f"checkpoint-{step}" / name) for folder in (copied, saved))
            assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)
    for path in checkpoints_of(copied):
        (Path(path) / "run.json").unlink(missing_ok=True)
    refused(
        resumed, True, "`resume_from_checkpoint=True`", "checkpoint-1: its file `run.json` is missing", "checkpoint-2"
    )


def test_without_an_optimizer_nothing_goes_on(tmp_path):
    config = SAVING | {"max_steps": 1}
    make_trainer(tmp_path, save_only_model=True, **config).train()
    refused(make_trainer(tmp_path, **config), True, "`save_only_model=True`")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_no_code_of_a_checkpoint_runs(copied, tmp_path, name):
    """Not even with a manifest that was made to fit."""
    folder, mark = copied / "checkpoint-1", tmp_path / "executed"
    torch.save(Malicious(mark), folder / name)
    seal(folder)
    assert damage(folder) is None
    with pytest.raises(pickle.UnpicklingError):
        make_trainer(copied, **SAVING).train(resume_from_checkpoint=str(folder))
    assert not mark.exists()


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, real = [], {"fsync": os.fsync, "replace": os.replace}
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.readlink(f"/proc/self/fd/{fd}")) or real["fsync"](fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("renamed " + str(b)) or real["replace"](a, b))
    make_trainer(tmp_path, **SAVING | {"max_steps": 1}).train()
    place = calls.index("renamed " + str(tmp_path / "checkpoint-1"))
    synced = {os.path.relpath(path, tmp_path / "_saving" / "checkpoint-1") for path in calls[:place]}
    assert {path.name for path in (tmp_path / "checkpoint-1").iterdir()} | {"."} <= synced
    assert str(tmp_path) in calls[place:]


def test_language_models_too(tmp_path, caplog):
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    text_runs.make_trainer(tmp_path, **config).train()
    for other in ({"weight": 2.0}, {"missing_reward": -0.5}, {"occurrence": "first"}):
        trainer = text_runs.make_trainer(tmp_path, blocks=text_runs.make_blocks(**other), **config)
        with pytest.raises(ValueError, match="`blocks` was"):
            trainer.train(resume_from_checkpoint=True)
    trainer = text_runs.make_trainer(tmp_path, temperature=0.5, **config)
    with pytest.raises(ValueError, match="`temperature` was 1.0, now 0.5"):
        trainer.train(resume_from_checkpoint=True)
    flip(tmp_path / "checkpoint-2" / "optimizer.pt")
    resumed = text_runs.make_trainer(tmp_path, **config | {"max_steps": 3})
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-2: its file `optimizer.pt` is damaged" in caplog.text
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3]
    assert "temperature" in json.loads((tmp_path / "checkpoint-3" / "run.json").read_text())["run"]
    trainer = text_runs.make_trainer(tmp_path, temperature=0.5, **config)
    trainer.is_deepspeed_enabled = True  # whose checkpoints of language models are pickles
    with pytest.raises(ValueError, match="can run any code.*`trust_checkpoint=True`"):
        trainer.train(resume_from_checkpoint=True)
    trainer.args.trust_checkpoint = True
    with pytest.raises(ValueError, match="`temperature` was 1.0, now 0.5"):
        trainer.train(resume_from_checkpoint=True)
