"""Signals that end a training: wherever they fall, the resumed run is the straight one."""

import os
import signal
import threading
import time

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerControl

from flow_trl.preemption import Preempted, Preemption
from tests.trainer import text_runs
from tests.trainer.runs import (
    Told,
    averages,
    critic_moments,
    critic_weights,
    kept_rewards,
    logged,
    make_trainer,
    prompts,
    weights,
)


TERM, INT = signal.SIGTERM, signal.SIGINT
RUNS = {
    "tp": {"max_steps": 5, "per_device_rollout_batch_size": 6, "ema_decay": 0.8, "beta": 0.1},
    "tdpo_r": {"max_steps": 6, "per_device_rollout_batch_size": 6, "ema_decay": 0.8, "reset_every": 1},
}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": False, "logging_steps": 1}


@pytest.fixture(autouse=True)
def interrupted_as_in_a_terminal():
    """Programs in the background of a shell ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    runs = {}
    for method, config in RUNS.items():
        runs[method] = make_trainer(
            tmp_path_factory.mktemp(method), method, evaluation=prompts(3), **config | EVALUATING
        )
        runs[method].train()
    return runs


def send(number):
    os.kill(os.getpid(), number)


class SentAtItsEnd:
    """Sends a signal from its destructor, where Python drops exceptions."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        send(self.number)


def call_after(owner, name, number, is_time, send=send):
    """Sends a signal before a method is called, at a time."""
    original, sent = getattr(owner, name), []

    def called(*args, **kwargs):
        if not sent and is_time(*args):
            sent.append(number)
            send(number)
        return original(*args, **kwargs)

    setattr(owner, name, called)


def told(trainer, place, number):
    """Makes a trainer get a signal at some place."""
    step = trainer._updates_per_generation  # the first of the second generation
    at = {
        "destructor": ("_sample", lambda update, chunk, *rest: update == step and chunk.first == 6),
        "sampling": ("_sample", lambda update, chunk, *rest: update == step and chunk.first == 6),
        "credit": ("_advantages", lambda *args: trainer.state.global_step == step),
        "updating": ("compute_loss", lambda *args: trainer.state.global_step == step + 1),
        "saving": ("_save_optimizer_and_scheduler", lambda *args: trainer.state.global_step == step),
        "first_sampling": ("_sample", lambda update, chunk, *rest: chunk.first == 6),
    }
    if place in at:
        name, is_time = at[place]
        call_after(trainer, name, number, is_time, SentAtItsEnd if place == "destructor" else send)
        return
    score = trainer.scorer.funcs[0]
    calls = []

    def scored(prompts, images, **columns):
        evaluates = len(images) == 3
        calls.append(evaluates)
        if (place == "evaluating" and evaluates) or (place == "scoring" and not evaluates and len(calls) == 3 * 3 + 2):
            send(number)
        return score(prompts=prompts, images=images, **columns)

    trainer.scorer.funcs[0] = scored


CASES = [
    ("tp", "sampling", TERM, 2),
    pytest.param(
        "tp",
        "destructor",
        TERM,
        2,
        marks=pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    ),
    ("tp", "scoring", INT, 2),
    ("tp", "credit", TERM, 3),
    ("tp", "updating", INT, 4),
    ("tp", "saving", TERM, 2),
    ("tp", "evaluating", INT, 2),
    ("tp", "first_sampling", TERM, 0),
    ("tdpo_r", "sampling", INT, 3),
    ("tdpo_r", "updating", TERM, 5),
]


@pytest.mark.parametrize("method, place, number, step", CASES)
def test_ended_and_resumed(tmp_path, straight, caplog, method, place, number, step):
    saves = {"save_strategy": "steps", "save_steps": 1} if place == "saving" else {}
    config = RUNS[method] | EVALUATING | saves | {"enable_jit_checkpoint": place == "updating"}
    before = signal.getsignal(TERM), signal.getsignal(INT)
    trainer = make_trainer(tmp_path, method, evaluation=prompts(3), **config)
    told(trainer, place, number)
    with pytest.raises(SystemExit) as info:
        trainer.train()
    assert info.value.code == 128 + number
    assert (signal.getsignal(TERM), signal.getsignal(INT)) == before
    assert trainer.state.global_step == step
    assert f"by a signal after {step} updates" in caplog.text
    found = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert found[-1:] == ([f"checkpoint-{step}"] if step else [])

    resumed = make_trainer(tmp_path, method, evaluation=prompts(3), **config)
    resumed.train(resume_from_checkpoint=bool(step))
    expected = straight[method]
    assert torch.equal(weights(resumed), weights(expected)) and torch.equal(averages(resumed), averages(expected))
    for name in ("total_nfe", "total_reward_calls", "loss", "reward", "eval_reward"):
        assert logged(resumed, name) == logged(expected, name), name
    if method == "tdpo_r":
        assert kept_rewards(resumed) == kept_rewards(expected)
        for read in (critic_weights, critic_moments):
            assert torch.equal(read(resumed), read(expected)), read.__name__


def test_a_checkpoint_of_a_signal_is_whole_though_others_are_the_model_only(tmp_path, straight):
    config = RUNS["tp"] | {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trainer = make_trainer(tmp_path, **config)
    told(trainer, "updating", TERM)
    with pytest.raises(SystemExit):
        trainer.train()
    resumed = make_trainer(tmp_path, **config)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), weights(straight["tp"]))


def test_language_models_too(tmp_path):
    config = {"max_steps": 3, "learning_rate": 0.1, "enable_jit_checkpoint": True}
    straight = text_runs.make_trainer(tmp_path / "straight", **config)
    straight.train()
    with pytest.raises(SystemExit):
        text_runs.make_trainer(tmp_path / "told", callbacks=[Told(0, 1)], **config).train()
    assert [path.name for path in (tmp_path / "told").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = text_runs.make_trainer(tmp_path / "told", **config)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(text_runs.weights(resumed), text_runs.weights(straight))


@pytest.fixture
def preemption():
    return Preemption(Accelerator(cpu=True))


def exit_code(function):
    """How a copy of this process ends."""
    process = os.fork()
    if process == 0:
        try:
            function()
        finally:
            os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_a_second_ctrl_c_kills_unless_a_launcher_sent_it(preemption):
    def twice(seconds, second=INT):
        with preemption.watching():
            send(INT)
            time.sleep(seconds)
            send(second)
            os._exit(0)

    assert exit_code(lambda: twice(0.0)) == 0
    assert exit_code(lambda: twice(1.1)) == -INT
    assert exit_code(lambda: twice(1.1, TERM)) == 0


def test_only_what_may_be_left_is_left(preemption):
    control = TrainerControl()
    args = type("Args", (), {})()
    reached = []
    with pytest.raises(Preempted) as info, preemption.watching():
        preemption.on_step_end(args, None, control)
        assert not control.should_training_stop
        send(TERM)  # is noted
        preemption.on_step_end(args, None, control)
        assert control.should_training_stop and control.should_save
        with preemption.interruptible():
            reached.append("sampling")
    assert info.value.code == 128 + TERM and not reached


def test_sampling_in_which_processes_meet_is_not_left():
    preemption = Preemption(Accelerator(cpu=True), interrupts=False)
    args, control, reached = type("Args", (), {})(), TrainerControl(), []
    with pytest.raises(KeyboardInterrupt), preemption.watching():
        with preemption.interruptible():
            send(INT)
            reached.append("sampled")
        preemption.on_step_end(args, None, control)
    assert reached and control.should_training_stop  # and what nobody has heard is sent again


def test_other_threads_are_not_disturbed(preemption):
    before, during = signal.getsignal(TERM), []

    def train():
        with preemption.watching():
            during.append(signal.getsignal(TERM))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert during == [before]
