import io
import re
from types import SimpleNamespace

import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState

from flow_trl.console import Column, ConsoleCallback, duration, number
from flow_trl.screens import Plain, Rich, _inline
from tests.trainer import runs, text_runs


ARGS = SimpleNamespace(generation_batch_size=128, num_generations=16)


def train(console, logs, max_steps=None, first_step=0):
    """Lets a console see a training in which each entry is what is logged after an update, and maybe an evaluation."""
    state = TrainerState(global_step=first_step, max_steps=max_steps or len(logs))
    state.is_world_process_zero, state.log_history = True, []
    control = TrainerControl()

    def log(entry):
        state.log_history.append({**entry, "step": state.global_step})
        console.on_log(ARGS, state, control, logs=entry)

    console.on_train_begin(ARGS, state, control)
    for trained, evaluated in logs:
        console.on_step_begin(ARGS, state, control)
        if trained:
            state.global_step += 1
            console.on_step_end(ARGS, state, control)
            control.should_evaluate = bool(evaluated)
            log({"loss": 1e-9, "grad_norm": 0.5, **trained})
        for entry in evaluated:
            log(entry)
            console.on_evaluate(ARGS, state, control)
    console.on_train_end(ARGS, state, control)


@pytest.mark.parametrize("screen", [Plain, Rich])
def test_a_line_per_log(capsys, screen):
    console = ConsoleCallback()
    console._screen, console.title, console.evaluates = screen(), "TPGRPOTrainer", True
    train(
        console,
        [
            ({}, [{"eval_reward": 57.852, "eval_reward_se": 3.126}]),
            ({"reward": 58.9, "turning_points/scene/step_1": 0.2, "turning_points/scene/step_2": 0.4, "kl": 0.0012,
              "clip_ratio/region_mean": 0.0312, "time/sampling": 9.71, "time/update": 3.0, "other": 7.0}, []),
            ({"reward": 61.2, "clip_ratio/region_mean": 0.0, "kl": 0.002, "time/sampling": 9.0, "time/update": 3.0},
             [{"eval_reward": 57.0, "eval_reward_se": 3.0}]),
        ],
    )  # fmt: skip
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "TPGRPOTrainer: 3 updates, generations of 128 samples: 8 prompts, 16 of each"
    assert "  turning: steps that are turning points" in lines and "  kl: divergence from the reference" in lines
    first = next(i for i, line in enumerate(lines) if line.startswith("---"))
    assert lines[first - 1 : first + 4] == [
        "update  reward       held out  change  turning      kl  clipped  sample s  train s",
        "-" * 82,
        "     0            57.85 ±3.13   +0.00",
        "     1   58.90                           30.0%  0.0012     3.1%       9.7      3.0",
        "     2   61.20    57.00 ±3.00   -0.85            0.002     0.0%       9.0      3.0",
    ]
    assert lines[-1] == "2 updates in 0:00"


def test_columns_of_other_trainers_and_of_ones_own(capsys):
    columns = {
        "blocks/solution/reward": "solution", "blocks/confidence/reward": "confidence", "step_time": "step s",
        "critic/explained_variance": "critic", "control_variate/correlation_3": "step corr.", "rewards/mine/mean": "mine",
        "completions/mean_length": "length",
    }  # fmt: skip
    console = ConsoleCallback([*ConsoleCallback().columns, Column("mine", r"rewards/mine/mean", "my own", ".3f")])
    console._screen = Plain()
    train(console, [(dict.fromkeys(columns, 0.25), [])])
    output = capsys.readouterr().out
    header = next(line for line in output.splitlines() if line.startswith("update  ")).split("  ")
    assert {title.strip() for title in header if title.strip()} == {"update", *columns.values()}
    row = output.splitlines()[-3].split()
    assert row.count("0.250") == 6 and row.count("0.2") == 1  # seconds


def test_several_evaluation_sets_share_a_line(capsys):
    console = ConsoleCallback()
    console._screen, console.eval_sets, console.evaluates = Plain(), ["easy_", "hard_"], True
    evaluated = [{"eval_easy_reward": 0.5}, {"eval_hard_reward": 0.25}]
    train(console, [({"reward": 1.0}, evaluated), ({"reward": 2.0}, [{"eval_easy_reward": 0.75}, evaluated[1]])])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].split() == ["1", "1.000", "0.500", "+0.000", "0.250", "+0.000"]
    assert lines[-3].split() == ["2", "2.000", "0.750", "+0.250", "0.250", "+0.000"]


def test_an_evaluation_outside_of_a_training(capsys):
    console = ConsoleCallback()
    console._screen = Plain()
    state = TrainerState(global_step=7)
    console.on_log(ARGS, state, TrainerControl(), logs={"eval_reward": 0.5, "eval_reward_se": 0.01})
    assert capsys.readouterr().out == "update 7  held out 0.500 ±0.010  change +0.000\n"


def test_bars_leave_nothing_behind():
    screen, file = Rich(), io.StringIO()
    screen.console = Console(file=file, force_terminal=True, width=100)
    screen.bars = Progress(*screen.bars.columns, console=screen.console, transient=True, auto_refresh=False)
    console = ConsoleCallback()
    console._screen = screen

    show, console._show = console._show, lambda **parts: (show(**parts), screen.bars.refresh())
    with console.progress(4, "Sampling") as bar:
        bar.update(4)
        screen.bars.refresh()
    train(console, [({"reward": 0.5}, [{"eval_reward": 0.25}]), ({"reward": 0.5}, [{"eval_reward": 0.5}])])
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", file.getvalue())
    assert "Sampling 4/4" in text and "reward 0.500" in text and "held out 0.500 (+0.250)" in text
    assert re.search(r"\d:\d\d left", text)
    assert not screen.bars.tasks and not screen.bars.live.is_started
    assert screen.bars.live.transient  # rich erases what it drew when it stops


def test_pictures_in_terminals_that_show_them(monkeypatch):
    image = Image.new("RGB", (64, 64))
    assert _inline(image) is None
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    for variable, value, start in (
        ("TERM_PROGRAM", "iTerm.app", "\033]1337;File=inline=1:"),
        ("TERM", "xterm-kitty", "\033_G"),
    ):
        monkeypatch.delenv("TERM_PROGRAM", raising=False)
        monkeypatch.setenv(variable, value)
        assert _inline(image).startswith(start)
    monkeypatch.setenv("TERM", "xterm")
    assert _inline(image) is None


def test_numbers():
    assert [number(value) for value in (0.0, 0.00123, 0.5, 57.852, 123.44, 12345.6)] == [
        "0.000", "0.0012", "0.500", "57.85", "123.4", "12346",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (4, 61, 3725)] == ["0:04", "1:01", "1:02:05"]


def test_image_trainers_print_with_it(tmp_path, capsys):
    options = {"eval_strategy": "steps", "eval_steps": 2, "log_completions": True, "num_completions_to_print": 3}
    trainer = runs.make_trainer(tmp_path, evaluation=runs.prompts(3), disable_tqdm=False, **options)
    assert not any(isinstance(c, PrinterCallback | ProgressCallback) for c in trainer.callback_handler.callbacks)
    trainer.train()
    output = capsys.readouterr().out
    history = trainer.state.log_history
    assert "{'" not in output and output.count("3 of the 16 samples of update") == 1  # two updates per generation
    rows = [line.split() for line in output.splitlines() if re.match(r"\s+[12]\s", line)]
    assert float(rows[0][1]) == round(history[0]["reward"], 3)
    assert float(rows[1][1]) == round(next(entry["eval_reward"] for entry in history if "eval_reward" in entry), 3)
    table = output.split("samples of update 1\n")[1].splitlines()
    assert table[0].split() == ["prompt", "brightness", "advantage"]
    assert all(line.startswith("a ") for line in table[1:4]) and not table[4]


def test_language_trainer_prints_with_it(tmp_path, capsys):
    text_runs.make_trainer(tmp_path, max_steps=1).train()
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("update "))
    assert {"solution", "confidence", "clipped", "length"} <= set(header.split())
    assert lines[0].startswith("BlockwiseGRPOTrainer: 1 updates, generations of 8 samples: 2 prompts, 4 of each")
