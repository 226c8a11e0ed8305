"""What [`BlockwiseGRPOTrainer`] says while it trains: warnings with a remedy, and the table of completions."""

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from statistics import fmean, pstdev
from typing import Any

from ..rewards.text import completion_text


class Watch:
    """
    Warns, once each, if a run learns nothing or unlearns, by means over `window` generations.

    Example:

    ```python
    >>> watch = Watch(["solution"], print, window=1)
    >>> watch.update([0.0], learning=0.5, reward=0.3)
    Block 'solution' was found in 0.0% of the last 1 generations' completions. ...
    ```
    """

    def __init__(self, names: Sequence[str], warn: Callable[[str], None], window: int = 10):
        self.names, self.warn, self.window = names, warn, window
        self.values: dict[str, deque[float]] = {}
        self.best: dict[str, float] = {}
        self.said: set[str] = set()

    def update(self, found: Sequence[float], learning: float, reward: float) -> None:
        """
        Takes in a generation: shares of completions that have each block, and that have any advantage, and the mean reward
        of the first block.
        """
        for name, share in zip(self.names, found, strict=True):
            mean = self._mean(f"found {name}", share)
            if mean is not None and mean < 0.05:
                self._say(
                    f"few {name}",
                    f"Block {name!r} was found in {mean:.1%} of the last {self.window} generations' completions. What is "
                    "never written cannot be rewarded: put an example of the layout into the prompt, train on a few "
                    "completions that have it first (`trl.SFTTrainer`), raise `max_completion_length` if completions "
                    "are cut off, or choose tags that the model knows.",
                )
            self._say_if_fallen(f"found {name}", f"The share of completions with block {name!r}", mean)
        mean = self._mean("learning", learning)
        if mean is not None and mean < 0.05:
            self._say(
                "learning",
                f"{mean:.1%} of the last {self.window} generations' completions had anything to learn from: all rewards "
                "of a group are the same. Take problems that are neither too easy nor too hard, raise "
                "`num_generations`, or weigh a reward that differs, such as the format's (`format_weight` of a task).",
            )
        name = f"The mean reward of block {self.names[0]!r}"
        self._say_if_fallen("reward", name, self._mean("reward", reward))

    def _mean(self, key: str, value: float) -> float | None:
        """Mean over the window, once that is full."""
        values = self.values.setdefault(key, deque(maxlen=self.window))
        if not math.isnan(value):
            values.append(value)
        return fmean(values) if len(values) == self.window else None

    def _say_if_fallen(self, key: str, name: str, mean: float | None) -> None:
        if mean is None:
            return
        best = self.best[key] = max(mean, self.best.get(key, mean))
        if best - mean > max(abs(best) / 2, 0.1, 3 * pstdev(self.values[key]) / self.window**0.5):
            self._say(
                f"fallen {key}",
                f"{name} has fallen from {best:.2f} to {mean:.2f} (means of {self.window} generations): training undoes "
                "what the model could do. Lower `learning_rate`, or set `beta` to keep it near where it began, and go on "
                "from an earlier checkpoint.",
            )

    def _say(self, key: str, message: str) -> None:
        if key not in self.said:
            self.said.add(key)
            self.warn(message)


def print_completions(
    prompts: list,
    completions: list,
    rewards: dict[str, list[float]],
    advantages: list[float],
    step: int,
    num_samples: int | None = None,
    extra: dict[str, list[Any]] | None = None,
    *,
    blocks: dict[str, float],
) -> None:
    """
    Prints completions as a table that fits the terminal, called like TRL's `print_prompt_completions_sample`: the prompt
    and each block (in `blocks`, with what it counts where it is missing) are a column, and below each text stand its reward
    and advantage, of `extra`. What else was logged is in the file of completions.
    """
    from rich.console import Console  # TRL asks whether it is there
    from rich.table import Table
    from rich.text import Text

    extra = extra or {}
    shown = range(len(prompts))
    if num_samples is not None:
        shown = sorted(random.sample(shown, max(0, min(num_samples, len(prompts)))))
    if not shown:
        return
    console = Console()
    longest = 2 * console.width
    table = Table(title=f"Step {step}", expand=True, show_lines=False)
    for name in ("prompt", *blocks):
        table.add_column(name, overflow="fold")
    for i in shown:
        prompt = (
            prompts[i] if isinstance(prompts[i], str) else completion_text([{"content": prompts[i][-1]["content"]}])
        )
        texts = [prompt, *((extra[f"{name}/text"][i] or "(missing)") for name in blocks)]
        own = [extra[f"{name}/reward"][i] for name in blocks]
        own = [blocks[name] if math.isnan(reward) else reward for name, reward in zip(blocks, own, strict=True)]
        numbers = [(sum(own), advantages[i])]
        numbers += [(reward, extra[f"{name}/advantage"][i]) for name, reward in zip(blocks, own, strict=True)]
        table.add_row(*(Text(_shorten(text, longest)) for text in texts))
        table.add_row(
            *(Text(f"reward {reward:.2f}\nadvantage {advantage:+.2f}", style="bold") for reward, advantage in numbers),
            end_section=True,
        )
    console.print(table)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-(length // 2) :]}"
