"""What a training prints: a progress bar, and a table with one line per log whose columns are what matters."""

import atexit
import re
import time
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from .screens import make_screen


class Column(NamedTuple):
    """
    A column of the table.

    Args:
        header (`str`): its title; `{}` stands for what the pattern's group matched, with a column for each.
        pattern (`str`): regular expression of the names of metrics whose mean is shown. Without any there is no column.
        meaning (`str`): said once, above the table.
        spec (`str`, *optional*): how a value is formatted, such as `".1%"`; in about four digits if not set.
    """

    header: str
    pattern: str
    meaning: str
    spec: str | None = None


COLUMNS = [
    Column("reward", r"reward", "mean of the training samples"),
    Column("{}", r"blocks/(.+)/reward", "mean reward of each block"),
    Column("step corr.", r"control_variate/.*correlation_\d+", "correlation of rewards before and after a step"),
    Column("turning", r"turning_points/.*step_\d+", "steps that are turning points", ".1%"),
    Column("critic", r"critic/explained_variance", "share of the returns' variance that the critic explains"),
    Column("kl", r"kl", "divergence from the reference"),
    Column("clipped", r"clip_ratio/region_mean", "ratios outside of the clip range", ".1%"),
    Column("length", r"completions/mean_length", "tokens of a completion"),
    Column("sample s", r"time/sampling", "seconds of a generation's denoising", ".1f"),
    Column("decode s", r"time/decoding", "of its decoder", ".1f"),
    Column("wait s", r"time/reward_wait", "of waiting for its rewards", ".1f"),
    Column("train s", r"time/update", "of an update", ".1f"),
    Column("step s", r"step_time", "seconds of an update with its share of the generation", ".1f"),
]


def number(value: float, like: float | None = None) -> str:
    """A number in about four digits, or in as many decimals as another one."""
    size = abs(value if like is None else like)
    if 0 < size < 0.01:
        return f"{value:.2g}"
    return f"{value:.{3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0}f}"


def duration(seconds: float) -> str:
    """Hours (if any), minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _headers(eval_set: str) -> list[str]:
    """Titles of the columns of a set's evaluation; its name is empty, or ends with `_`."""
    return [f"{title} {eval_set}".strip(" _") for title in ("held out", "change")]


class ConsoleCallback(TrainerCallback):
    """
    Prints a training for people: a bar with the reward, the held-out reward, its change and the time left, and a line of a
    table per log. Everything else that is logged is in the trackers and in `trainer.state.log_history`. Bars are drawn by
    rich if it is installed and by tqdm if not; there are none where nothing shows them, or with `disable_tqdm=True`.

    All trainers of this library use it instead of transformers' `ProgressCallback`. To have that back, remove this one:
    `trainer.remove_callback(ConsoleCallback)` and `trainer.add_callback(ProgressCallback)`.

    Args:
        columns (`list[Column]`, *optional*):
            Columns of the table. If not set, those of `COLUMNS` that the first log has values for.

    Example:

    ```python
    >>> columns = [*COLUMNS, Column("edges", r"rewards/edges/mean", "mean of my reward")]
    >>> trainer = TPGRPOTrainer(..., callbacks=[ConsoleCallback(columns)])
    ```
    """

    def __init__(self, columns: list[Column] | None = None):
        self.columns = COLUMNS if columns is None else columns
        self.title, self.eval_sets, self.is_quiet, self.evaluates = "", [""], False, False
        self._screen: Any = None
        self._begin(is_training=False)

    def _begin(self, is_training: bool) -> None:
        self._is_training, self._bar, self._evaluating = is_training, None, None
        self._head: list[tuple[str, list[str], str | None]] | None = None  # header, names of metrics, format
        self._row: dict[str, Any] = {}  # is being filled
        self._waiting: list[dict[str, Any]] = []  # for the table to begin
        self._beside: dict[str, str] = {}  # what stands beside the bar

    @property
    def screen(self) -> Any:
        if self._screen is None:
            self._screen = make_screen()
            atexit.register(self._screen.close)  # a training that fails leaves its bar
        return self._screen

    def progress(self, total: int, description: str) -> Any:
        """
        A bar for a part of an update, such as the sampling of a generation.

        Args:
            total (`int`): of what is done.
            description (`str`): what is done.

        Returns:
            A context manager; what it gives has tqdm's `update(n)`.
        """
        return closing(tqdm(disable=True) if self.is_quiet else self.screen.task(total, description))

    def on_train_begin(self, args, state, control, **kwargs):
        self.screen.close()
        self._begin(is_training=True)
        self.began, self.first_step = time.monotonic(), state.global_step
        if not state.is_world_process_zero:
            return
        size, group = getattr(args, "generation_batch_size", None), getattr(args, "num_generations", None)
        sizes = f", generations of {size} samples: {size // group} prompts, {group} of each" if size and group else ""
        self.screen.print(f"{self.title}: {state.max_steps} updates{sizes}\n", "bold")
        if not self.is_quiet:
            self._bar = self.screen.task(state.max_steps, "Training")
            self._bar.update(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self._flush()

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            done = state.global_step - self.first_step
            left = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step)
            self._bar.update(1)
            self._show(left=f"{duration(left)} left")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not self.is_quiet:
            if self._evaluating is None:
                self._evaluating = self.screen.task(len(eval_dataloader), "Evaluating")
            self._evaluating.update(1)

    def on_evaluate(self, args, state, control, **kwargs):
        if self._evaluating is not None:
            self._evaluating.close()
            self._evaluating = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        evaluated = [name for name in self.eval_sets if f"eval_{name}reward" in logs]
        if evaluated:
            self._row.setdefault("update", state.global_step)
            for name in evaluated:
                self._add_evaluation(name, logs, state.log_history)
            if all(_headers(name)[0] in self._row for name in self.eval_sets):
                self._flush()
        elif "loss" in logs:
            self._flush()
            if self._head is None:
                self._begin_table(logs)
            if "reward" in logs:
                self._show(reward=f"reward {number(logs['reward'])}")
            self._row = {"update": state.global_step}
            for header, names, spec in self._head:
                values = [logs[name] for name in names if logs.get(name) is not None]
                if values:
                    self._row[header] = format(np.mean(values), spec) if spec else number(np.mean(values))
            if not control.should_evaluate:  # otherwise the evaluation comes into the same line
                self._flush()

    def on_train_end(self, args, state, control, **kwargs):
        self._flush()
        self.screen.close()
        waiting, done = self._waiting, state.global_step - self.first_step
        self._begin(is_training=False)
        for row in waiting:
            self._print_row(row)
        if state.is_world_process_zero:
            self.screen.print(f"\n{done} updates in {duration(time.monotonic() - self.began)}")

    def show_completions(
        self, step: int, table: dict[str, list], count: int | None, image: Image.Image | None
    ) -> None:
        """
        Prints some rows of a table of samples, spread over it, and a picture where pictures can be shown.

        Args:
            step (`int`):
                Number of updates so far.
            table (`dict[str, list]`):
                Columns of N strings or numbers each.
            count (`int`, *optional*):
                How many rows are printed; all if not set.
            image (`PIL.Image.Image`, *optional*):
                The picture: shown in notebooks, and in the terminals of iTerm, WezTerm, kitty and Ghostty.
        """
        size = len(next(iter(table.values())))
        rows = np.linspace(0, size - 1, min(size, size if count is None else count)).round().astype(int)
        columns = []
        for name, values in table.items():
            cells = [number(values[i]) if isinstance(values[i], float) else str(values[i]) for i in rows]
            width = min(60, max(map(len, [name, *cells])))
            is_text = isinstance(values[0], str)
            columns.append([f"{cell[:width]:{'<' if is_text else '>'}{width}}" for cell in [name, *cells]])
        lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
        self.screen.print(f"\n{len(rows)} of the {size} samples of update {step}\n{lines[0]}", "bold")
        self.screen.print("\n".join(lines[1:]) + "\n")
        if image is not None:
            self.screen.show(image)

    def _show(self, **parts: str) -> None:
        """Changes parts of what stands beside the bar."""
        self._beside |= parts
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(self._beside.values()))

    def _add_evaluation(self, name: str, logs: dict[str, float], history: list[dict]) -> None:
        key = f"eval_{name}reward"
        value, error = logs[key], logs.get(f"{key}_se")
        change = value - next((entry[key] for entry in history if key in entry), value)
        held_out, changed = _headers(name)
        self._row[held_out] = number(value) + (f" ±{number(error, value)}" if error is not None else "")
        self._row[changed] = f"{'-' if change < 0 else '+'}{number(abs(change), value)}"
        self._show(**{held_out: f"{held_out} {number(value)} ({self._row[changed]})"})

    def _begin_table(self, logs: dict[str, float]) -> None:
        """Prints what the columns mean, and their headers."""
        self._head, meanings, titles = [], ["update: number of updates so far"], ["update"]
        for column in self.columns:
            headers: dict[str, list[str]] = {}
            for name in logs:
                if match := re.fullmatch(column.pattern, name):
                    headers.setdefault(column.header.format(*match.groups()), []).append(name)
            self._head += [(header, names, column.spec) for header, names in headers.items()]
            titles += headers
            if headers:
                meanings.append(f"{', '.join(headers)}: {column.meaning}")
        if self._waiting or self.evaluates:
            titles[2:2] = [title for name in self.eval_sets for title in _headers(name)]
            meanings.insert(2, "held out: reward of the evaluation ± standard error; change: since the first one")
        self._widths = {title: max(len(title), 13 if title.startswith("held out") else 6) for title in titles}
        line = "  ".join(f"{title:>{width}}" for title, width in self._widths.items())
        self.screen.print("\n".join(f"  {meaning}" for meaning in meanings) + "\n")
        self.screen.print(f"{line}\n{'-' * len(line)}", "bold")
        waiting, self._waiting = self._waiting, []
        for row in waiting:
            self._print_row(row)

    def _flush(self) -> None:
        """Prints the line that was filled, as soon as the table has begun."""
        row, self._row = self._row, {}
        if row and self._is_training and self._head is None:
            self._waiting.append(row)
        elif row:
            self._print_row(row)

    def _print_row(self, row: dict[str, Any]) -> None:
        if self._head is None:
            self.screen.print("  ".join(f"{title} {cell}" for title, cell in row.items()))
        else:
            line = "  ".join(f"{row.get(title, ''):>{width}}" for title, width in self._widths.items())
            self.screen.print(line.rstrip(), "cyan" if "change" in " ".join(row) else None)


def use_console(trainer: Any) -> ConsoleCallback:
    """
    Lets a trainer print what [`ConsoleCallback`] does, instead of dictionaries.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer; TRL's are fine too.

    Returns:
        [`ConsoleCallback`]: the one among the trainer's callbacks, or a new one.

    Example:

    ```python
    >>> use_console(trl.GRPOTrainer(...)).title
    'GRPOTrainer'
    ```
    """
    callbacks = trainer.callback_handler.callbacks
    for callback in list(callbacks):
        if type(callback) in (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK):
            trainer.remove_callback(callback)
    if not any(isinstance(callback, ConsoleCallback) for callback in callbacks):
        trainer.add_callback(ConsoleCallback())
    console = next(callback for callback in callbacks if isinstance(callback, ConsoleCallback))
    console.title = type(trainer).__name__
    console.is_quiet = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
    console.evaluates = trainer.args.eval_strategy != "no" or trainer.args.eval_on_start
    if isinstance(trainer.eval_dataset, dict):
        console.eval_sets = [f"{name}_" for name in trainer.eval_dataset]
    return console
