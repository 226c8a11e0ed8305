"""What a signal that ends a training does: the phase ends, a checkpoint is written, the process exits."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


class Preempted(SystemExit):
    """Ends a process that a signal told to end, when its checkpoint is written; `code` is 128 + the signal's number."""


class Preemption(TrainerCallback):
    """
    Notes `SIGTERM` and Ctrl-C while a training runs. Sampling and scoring are left at once (if `interrupts`: not with
    FSDP or DeepSpeed, whose processes meet within them); whatever changes the state of the training is ended first. A
    second Ctrl-C kills.

    Example:

    ```python
    >>> preemption = Preemption(accelerator)
    >>> with preemption.watching():
    ...     with preemption.interruptible():  # a signal raises `Preempted` here
    ...         sample()
    ...     update()  # and not here
    ```
    """

    def __init__(self, accelerator: Accelerator, interrupts: bool = True):
        self.accelerator, self.interrupts = accelerator, interrupts
        self._signal: int | None = None
        self._is_interruptible, self.is_due, self._came_at = False, False, 0.0

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal; where only another process was told, that of `SIGTERM`."""
        return 128 + (self._signal or signal.SIGTERM)

    def take_over(self, callback: JITCheckpointCallback | None) -> None:
        """Puts `enable_jit_checkpoint` of transformers out of force: it saves where nothing can go on from."""
        if callback is not None:
            signal.signal(signal.SIGTERM, callback.jit_manager._original_sigterm_handler or signal.SIG_DFL)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this context signals are noted. One that came too late to end the training is sent again after it."""
        self._signal, self.is_due, before = None, False, {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        late = None
        try:
            yield
            late = self._signal
        finally:
            self._signal, self.is_due = None, False
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
        if late is not None:
            signal.raise_signal(late)

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if self._signal is not None:
            # A launcher hands on what the terminal has sent to all processes already.
            if number == signal.SIGINT and now - self._came_at > 1:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.raise_signal(signal.SIGINT)
            return
        self._signal, self._came_at = number, now
        if self.accelerator.is_main_process:
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: training ends with a checkpoint (Ctrl-C, once more, kills it).\n".encode())
        if self._is_interruptible:
            self._is_interruptible = False
            raise Preempted(self.exit_code)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within this context a signal, or one that came before it, raises `Preempted`."""
        if not self.interrupts:
            yield
            return
        self._is_interruptible = True
        try:
            if self._signal is not None or self.is_due:
                raise Preempted(self.exit_code)
            yield
            if self._signal is not None:  # the exception was lost, as in a destructor
                raise Preempted(self.exit_code)
        finally:
            self._is_interruptible = False

    def on_step_end(self, args, state, control, **kwargs):
        told = torch.tensor([self._signal is not None], device=self.accelerator.device)
        if self.accelerator.gather(told).any():
            self.is_due = control.should_save = control.should_training_stop = True
            args.save_only_model = False
