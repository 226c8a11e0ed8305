"""
Where a training prints: a terminal or a file, by rich if it is installed and by tqdm if not, or a notebook.

Each screen has `print`, `show` for pictures, and `task`, which makes a bar with tqdm's `update`, `set_postfix_str` and
`close`.
"""

import base64
import io
import os
import sys

from PIL import Image
from tqdm import tqdm
from transformers.utils import is_rich_available


class Plain:
    """Lines of text, with tqdm's bars on a terminal."""

    def __init__(self):
        self._bars: list[tqdm] = []

    def task(self, total: int, description: str) -> tqdm:
        layout = "{desc} {n_fmt}/{total_fmt} |{bar:20}| {postfix}"
        bar = tqdm(total=total, desc=description, leave=False, disable=None, bar_format=layout)
        self._bars.append(bar)
        return bar

    def print(self, text: str, style: str | None = None) -> None:
        tqdm.write(text)

    def show(self, image: Image.Image) -> None:
        if (code := _inline(image)) is not None:
            tqdm.write(code)

    def close(self) -> None:
        for bar in self._bars[::-1]:
            bar.close()
        self._bars = []


class Rich:
    """The same by rich."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.console = Console(highlight=False, markup=False)
        columns = (
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(20),
            TextColumn("{task.fields[text]}"),
        )
        self.bars = Progress(*columns, console=self.console, transient=True, refresh_per_second=2)

    def task(self, total: int, description: str) -> "RichTask":
        if self.console.is_terminal:
            self.bars.start()
        return RichTask(self, self.bars.add_task(description, total=total, text=""))

    def print(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, soft_wrap=True)

    def show(self, image: Image.Image) -> None:
        if (code := _inline(image)) is not None:
            self.bars.stop()
            self.console.file.write(code + "\n")
            if self.bars.tasks:
                self.bars.start()

    def close(self) -> None:
        for task in self.bars.task_ids:
            self.bars.remove_task(task)
        if self.bars.live.is_started:
            self.bars.stop()


class RichTask:
    """A bar of rich with tqdm's methods."""

    def __init__(self, screen: Rich, number: int):
        self.screen, self.number = screen, number

    def update(self, n: int) -> None:
        self.screen.bars.advance(self.number, n)

    def set_postfix_str(self, text: str) -> None:
        self.screen.bars.update(self.number, text=text)

    def close(self) -> None:
        self.screen.bars.remove_task(self.number)
        if not self.screen.bars.tasks:
            self.screen.close()


class Notebook:
    """The same in a notebook, where one output is rewritten."""

    def __init__(self):
        self.tasks: list[NotebookTask] = []
        self.handle = None

    def task(self, total: int, description: str) -> "NotebookTask":
        return NotebookTask(self, total, description)

    def refresh(self) -> None:
        from IPython.display import display

        text = {"text/plain": "\n".join(map(str, self.tasks))}
        if self.handle is None:
            self.handle = display(text, raw=True, display_id=True)
        else:
            self.handle.update(text, raw=True)
        if not self.tasks:
            self.handle = None

    def print(self, text: str, style: str | None = None) -> None:
        print(text)

    def show(self, image: Image.Image) -> None:
        from IPython.display import display

        display(image)

    def close(self) -> None:
        if self.tasks:
            self.tasks.clear()
            self.refresh()


class NotebookTask:
    """A bar in a notebook with tqdm's methods."""

    def __init__(self, screen: Notebook, total: int, description: str):
        self.screen, self.total, self.description, self.done, self.text = screen, total, description, 0, ""
        screen.tasks.append(self)
        screen.refresh()

    def __str__(self) -> str:
        filled = 20 * self.done // max(1, self.total)
        return f"{self.description} {self.done}/{self.total} {'█' * filled}{'░' * (20 - filled)} {self.text}"

    def update(self, n: int) -> None:
        self.done += n
        self.screen.refresh()

    def set_postfix_str(self, text: str) -> None:
        self.text = text
        self.screen.refresh()

    def close(self) -> None:
        if self in self.screen.tasks:
            self.screen.tasks.remove(self)
            self.screen.refresh()


def make_screen() -> Plain | Rich | Notebook:
    """What this process prints to."""
    if "ipykernel" in sys.modules:
        return Notebook()
    return Rich() if is_rich_available() else Plain()


def _inline(image: Image.Image) -> str | None:
    """The code that shows a picture in the terminal, if it is known to understand one."""
    program, kind = os.environ.get("TERM_PROGRAM", ""), os.environ.get("TERM", "")
    is_iterm, is_kitty = program in ("iTerm.app", "WezTerm"), kind == "xterm-kitty" or program == "ghostty"
    if not sys.stdout.isatty() or not (is_iterm or is_kitty):
        return None
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    if is_iterm:
        return f"\033]1337;File=inline=1:{data}\a"
    parts = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    codes = [f"m={int(i < len(parts) - 1)};{part}" for i, part in enumerate(parts)]
    return "".join(f"\033_G{'f=100,a=T,' if i == 0 else ''}{code}\033\\" for i, code in enumerate(codes))
