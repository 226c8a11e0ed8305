"""
Compares mathematical answers by math-verify in processes of their own, with time limits.

What a model writes may keep a computer algebra system busy for ever. A limit of CPU time holds for each answer and one of
time for all that are compared at once; what has not been compared by then counts as wrong, which one short line of the log
says. The processes are started when they are needed and end with this one.
"""

import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress


logger = logging.getLogger(__name__)

ANSWER_SECONDS = (0.1, 3.0)  # of CPU time: first for every answer, then for those that took longer
# For the latter; to get through all a machine with other work has the extra seconds for each answer.
BATCH_SECONDS, EXTRA_SECONDS = 15.0, 0.05
START_SECONDS = 300.0
MEMORY = 4 * 2**30
MAX_WORKERS = 8

_idle: "list[_Worker]" = []
_lock = threading.Lock()

Job = tuple[tuple[str, ...], str]


def compare(jobs: Sequence[Job]) -> list[bool | None]:
    """
    Compares answers with the right ones.

    Args:
        jobs (`Sequence[tuple[tuple[str, ...], str]]`):
            Readings of an answer, of which any may be right, and the right answer.

    Returns:
        `list[bool | None]`: whether one of the readings is right; `None` where that was not found out in time.

    Example:

    ```python
    >>> compare([(("18 dollars", "18"), "18"), (("9^{9^{9^9}}",), "18")])
    [True, None]
    ```
    """
    jobs = list(jobs)
    if not jobs:
        return []
    results: list[bool | None] = [None] * len(jobs)
    with _lock:
        count = min(_num_workers(), len(jobs))
        while len(_idle) < count:
            _idle.append(_Worker())
        for worker in _idle[:count]:
            worker.wait_until_ready()
        start = time.monotonic()
        ends = start + BATCH_SECONDS + EXTRA_SECONDS * len(jobs), start + BATCH_SECONDS
        for seconds, end in zip(ANSWER_SECONDS, ends, strict=True):
            _compare_rest(jobs, results, _idle[:count], seconds, end)
    late = [jobs[index][0][0] for index, result in enumerate(results) if result is None]
    if late:
        logger.warning(
            f"{len(late)} of {len(jobs)} answers could not be compared in time and count as wrong, among them "
            f"{late[0][:40]!r}."
        )
    return results


def _compare_rest(
    jobs: list[Job], results: list[bool | None], workers: "list[_Worker]", seconds: float, end: float
) -> None:
    """Compares what has no result yet, side by side, each within some seconds of CPU time and all until the end."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index, result in enumerate(results):
        if result is None:
            waiting.put(index)

    def work(worker: _Worker) -> None:
        with suppress(queue.Empty):
            while time.monotonic() < end:
                index = waiting.get_nowait()
                results[index] = worker.ask(jobs[index], seconds, end)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def stop() -> None:
    """Ends the processes; the next comparison starts new ones."""
    with _lock:
        while _idle:
            _idle.pop().kill()


def _num_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class _Worker:
    """A process that compares one answer after the other."""

    def __init__(self):
        self._start()

    def _start(self) -> None:
        # Not `multiprocessing`, which may run the user's script again.
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # an interrupt is for this process, with whose end it ends
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self.ready = False
        self.rest = b""

    def kill(self) -> None:
        with suppress(OSError), self.process:
            self.process.kill()

    def wait_until_ready(self) -> None:
        if self.process.poll() is not None:
            self.kill()
            self._start()
        if not self.ready:
            self.ready = self._read(time.monotonic() + START_SECONDS) is not None

    def _read(self, end: float) -> object | None:
        """What the process says next; `None` if it has ended or is not heard of in time."""
        while b"\n" not in self.rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                return None
            received = os.read(self.process.stdout.fileno(), 4096)
            if not received:
                return None
            self.rest += received
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)

    def ask(self, job: Job, seconds: float, end: float) -> bool | None:
        self.wait_until_ready()
        # Beyond the limit that it keeps itself, it is within a step that nothing but its end ends.
        end = min(end, time.monotonic() + 10 * seconds + 1)
        try:
            self.process.stdin.write(json.dumps([*job, seconds]).encode() + b"\n")
            reply = self._read(end)
        except OSError:
            reply = None
        if reply is None:
            self.kill()
            self._start()
            return None
        return None if reply == "late" else reply


class _Late(BaseException):
    """No `Exception`: math-verify passes over those."""


def _verify(readings: Sequence[str], answer: str) -> bool:
    from math_verify import parse, verify

    def expression(text: str) -> list:
        return parse(rf"\boxed{{{text}}}", parsing_timeout=None)

    gold = expression(answer)
    for reading in readings:
        with suppress(Exception):
            if verify(gold, expression(reading), timeout_seconds=None):
                return True
    return False


def _serve() -> None:
    """Answers `[readings, answer, seconds]` on each line of the standard input, until that is closed."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the parser may print is no reply
    logging.disable(logging.CRITICAL)
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    limited = hasattr(signal, "setitimer")

    def raise_late(*_):
        raise _Late

    if limited:
        signal.signal(signal.SIGPROF, raise_late)
    _verify(["1.0"], "1")  # imports what it needs
    print("true", file=replies, flush=True)
    for line in sys.stdin:
        *job, seconds = json.loads(line)
        try:
            try:
                if limited:
                    signal.setitimer(signal.ITIMER_PROF, seconds)
                reply = _verify(*job)
            finally:
                if limited:
                    signal.setitimer(signal.ITIMER_PROF, 0)
        except _Late:
            reply = "late"
        except Exception:
            reply = False
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
