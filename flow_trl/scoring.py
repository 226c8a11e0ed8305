"""Named reward functions on images: called, checked, weighed; with timeouts and retries. Knows no trainer."""

import asyncio
import copy
import inspect
import logging
import math
import numbers
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import Future
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import torch
from trl.trainer.utils import is_async_callable, start_event_loop_in_daemon

from .rewards import BUILT_IN_REWARDS, EXTRAS, get_reward_func, reward_name
from .utils import to_pil


logger = logging.getLogger(__name__)

RewardFunc = str | Callable[..., list[float | None]]
FIRST_BACKOFF, LAST_BACKOFF = 1.0, 60.0  # seconds before the first and, at most, before a later retry


def in_thread(call: Callable[[], Any]) -> Future:
    """Starts a call in a daemon thread on this thread's GPU: one that hangs can be left behind, and keeps no process."""
    future, device = Future(), torch.cuda.current_device() if torch.cuda.is_initialized() else None
    future.set_running_or_notify_cancel()

    def run():
        nonlocal call
        try:
            if device is not None:
                torch.cuda.set_device(device)
            result, call = call(), None  # the images that it was given are free before the result is known
            future.set_result(result)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _read(result: Any) -> Any:
    """What a function returned; a generator does its work here."""
    return list(result) if isinstance(result, Iterator) else result


def own_images(images: list | torch.Tensor) -> list:
    """PIL images, or lists of frames, that share nothing with those given (or pixels, see [`~utils.to_pil`])."""
    if isinstance(images, torch.Tensor):
        return to_pil(images)
    return [own_images(image) if isinstance(image, list) else image.copy() for image in images]


def _taken(func: Callable, names: Iterable[str]) -> list[str]:
    """Those of some keyword arguments that a function takes."""
    try:
        parameters = inspect.signature(func).parameters
    except ValueError:  # a callable that does not tell its signature
        return []
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return [name for name in names if takes_all or name in parameters]


class RewardLog:
    """
    What reward functions log beside their scores, as TRL's do.

    Attributes:
        metrics (`dict[str, list[float]]`): what they gave to `log_metric(name, value)`.
        columns (`dict[str, list]`): what they gave to `log_extra(column, values)`, one value per image.
    """

    def __init__(self):
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.columns: dict[str, list] = defaultdict(list)

    def extras(self, trainer_state: Any, columns: bool = True) -> dict[str, Any]:
        """The `extras` of a call of [`Scorer`]; without `columns`, `log_extra` does nothing."""
        return {
            "trainer_state": trainer_state,
            "log_metric": lambda name, value: self.metrics[name].append(float(value)),
            "log_extra": lambda column, values: self.columns[column].extend(values) if columns else None,
        }


class Scorer:
    """
    Scores images with one or more reward functions, see [`flow_trl.rewards`] for what they are.

    Every function gets images and columns of its own, so that nothing it does to them reaches the next. Async functions
    run beside each other and beside the sync ones, which run one after another; all async calls share one event loop.

    Args:
        reward_funcs (`str`, `Callable` or a list of them):
            The functions; a string names a built-in one.
        reward_weights (`list[float]`, *optional*):
            Weight of each function that is not out of domain. If not set, all are 1.
        out_of_domain_rewards (`list[str]`, *optional*):
            Names of built-in functions, or of functions in `reward_funcs`, that are watched: their weight is 0.
        reward_timeout (`float`, *optional*):
            Seconds that one call may take. An async call is then cancelled, a sync one left behind in its thread.
        reward_retries (`int`, *optional*, defaults to `0`):
            How many times a call that raised, took too long or returned no scores is repeated, after 1, 2, 4, ...
            seconds (at most 60).
        reward_on_error (`str`, *optional*, defaults to `"raise"`):
            What follows after the last try: `"raise"`, or `"none"`, for which the images count as not applicable, with
            a warning and a count in `failures`.

    Attributes:
        names (`list[str]`): names of the F functions.
        weights (`torch.Tensor` of shape `(F,)`): their weights.
        trained (`list[int]`): indices of the functions with a weight other than 0.
        in_domain (`list[int]`): indices of the functions that are not out of domain.
        failures (`Counter[str]`): number of images for which a function failed so far, by its name.

    Raises:
        TypeError, ValueError: if a function is unknown, two have one name, or the weights do not fit.

    Example:

    ```python
    >>> from flow_trl.scoring import Scorer

    >>> scorer = Scorer(["ocr", "clip_score"], reward_weights=[1.0, 0.01], reward_timeout=60)
    >>> scores = scorer(images, ['the word "CAT"'] * len(images))  # (N, 2)
    >>> rewards = scorer.weighted(scores)  # (N,)
    ```
    """

    def __init__(
        self,
        reward_funcs: RewardFunc | list[RewardFunc],
        reward_weights: list[float] | None = None,
        out_of_domain_rewards: list[str] | None = None,
        *,
        reward_timeout: float | None = None,
        reward_retries: int = 0,
        reward_on_error: str = "raise",
    ):
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        if not reward_funcs:
            raise ValueError("`reward_funcs=[]` is empty: pass at least one reward function or name.")
        self.funcs = [get_reward_func(reward) for reward in reward_funcs]
        self.names = [reward_name(reward) for reward in self.funcs]
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"`reward_funcs` have the names {self.names}: give each its own `__name__`.")
        out_of_domain = list(dict.fromkeys(out_of_domain_rewards or []))
        trained = [name for name in self.names if name not in out_of_domain]
        if not trained:
            raise ValueError(
                f"`out_of_domain_rewards={out_of_domain}` leaves none of `reward_funcs` to train on: pass one that is not "
                "among them."
            )
        for name in out_of_domain:
            if name not in self.names:
                if name not in BUILT_IN_REWARDS:
                    raise ValueError(
                        f"`out_of_domain_rewards={out_of_domain}` has {name!r}, which is neither a built-in reward "
                        f"({', '.join(BUILT_IN_REWARDS)}) nor among `reward_funcs` ({', '.join(self.names)}): add "
                        "the function to `reward_funcs`."
                    )
                self.funcs.append(get_reward_func(name))
                self.names.append(name)
        weights = [1.0] * len(trained) if reward_weights is None else reward_weights
        if len(weights) != len(trained):
            raise ValueError(
                f"`reward_weights={weights}` has {len(weights)} entries for the {len(trained)} reward functions "
                f"{trained}: pass one weight for each."
            )
        weight_of = dict(zip(trained, weights, strict=True))
        self.weights = torch.tensor([weight_of.get(name, 0.0) for name in self.names])
        self.trained = self.weights.nonzero().flatten().tolist()
        self.in_domain = [f for f, name in enumerate(self.names) if name in weight_of]
        self.reward_timeout = reward_timeout
        self.reward_retries = reward_retries
        self.reward_on_error = reward_on_error
        self.failures: Counter[str] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting = threading.Lock()

    def check_videos(self, videos: bool) -> None:
        """Raises a `ValueError` if videos are scored and a function does not take them."""
        for name, func in zip(self.names, self.funcs, strict=True):
            if videos and not getattr(func, "takes_videos", True):
                raise ValueError(
                    f"The reward function `{name}` scores single images, but the pipeline makes videos: pass a function of "
                    "your own that picks frames (each entry of `images` is a list of frames), or set `num_frames` to 1."
                )

    def check(self, dataset: str, columns: list[str]) -> None:
        """
        Raises a `TypeError` or `ValueError` if a function cannot be called with the columns, beside the prompt, of a
        data set, which is called `dataset` in the message.
        """
        reserved = {"prompts", "images", *EXTRAS} & set(columns)
        if reserved:
            raise ValueError(
                f"`{dataset}` has a column `{min(reserved)}`, which reward functions get under that name already: rename it."
            )
        for name, func in zip(self.names, self.funcs, strict=True):
            try:
                inspect.signature(func).bind(**dict.fromkeys(["prompts", "images", *columns, *_taken(func, EXTRAS)]))
            except ValueError:  # a callable that does not tell its signature
                continue
            except TypeError as error:
                raise TypeError(
                    f"The reward function `{name}` cannot be called for `{dataset}`: {error}. It is called by keyword "
                    f"with `prompts`, `images` and the other columns {columns}; it can take those that it does not need "
                    "as `**columns`."
                ) from error

    def __call__(
        self,
        images: list | torch.Tensor,
        prompts: list[str],
        columns: dict[str, list] | None = None,
        *,
        functions: list[int] | None = None,
        extras: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """
        Scores images.

        Args:
            images (`list` or `torch.Tensor`):
                N images (or videos), see [`own_images`].
            prompts (`list[str]`):
                The N prompts.
            columns (`dict[str, list]`, *optional*):
                Further columns, N entries each.
            functions (`list[int]`, *optional*):
                Indices of the functions that are asked. If not set, all are.
            extras (`dict[str, Any]`, *optional*):
                Further keyword arguments, for those functions that take them.

        Returns:
            `torch.Tensor` of shape `(N, F)`, float32: scores; NaN where a function does not apply or was not asked.

        Raises:
            ValueError: if there are not as many prompts or entries of a column as images.
            Exception: what a function raised, or `TimeoutError`, `TypeError` or `ValueError` if it took too long or
                returned no scores; with a note that names the function. Not if `reward_on_error="none"`.
        """
        columns = columns or {}
        lengths = {name: len(values) for name, values in {"images": images, "prompts": prompts, **columns}.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Scores need a prompt and an entry of each column per image, but there are {lengths}.")
        asked = range(len(self.funcs)) if functions is None else functions
        scores = torch.full((len(prompts), len(self.funcs)), float("nan"))
        arguments = (images, prompts, columns, extras or {})
        started = {f: self._start(f, *arguments) for f in asked if is_async_callable(self.funcs[f])}
        concurrent = {f: in_thread(partial(self._try, f, *arguments, future)) for f, future in started.items()}
        results = {f: self._try(f, *arguments) for f in asked if f not in concurrent}
        results |= {f: future.result() for f, future in concurrent.items()}
        for f, result in results.items():
            scores[:, f] = torch.tensor(result)
        return scores

    def weighted(self, scores: torch.Tensor) -> torch.Tensor:
        """
        Rewards (...) of scores (..., F): the weighted sum over the functions that have a weight and apply, 0 where
        none applies.
        """
        return (scores * self.weights).nansum(dim=-1)

    def metrics(self, scores: torch.Tensor, errors: bool = False) -> dict[str, float]:
        """
        Figures of each function over the images to which it applies, of scores (N, F): `rewards/<name>/mean`, `/std`
        and, with `errors`, the standard error of the mean, `/se`.
        """
        metrics = {}
        for name, values in zip(self.names, scores.T, strict=True):
            values = values[~values.isnan()]
            if len(values):
                metrics[f"rewards/{name}/mean"] = values.mean().item()
                metrics[f"rewards/{name}/std"] = std = values.std(unbiased=False).item()
                if errors:
                    metrics[f"rewards/{name}/se"] = std / len(values) ** 0.5
        return metrics

    def unscored(self, scores: torch.Tensor) -> list[str]:
        """Names of the trained functions that applied to none of the images of scores (..., F)."""
        return [self.names[f] for f in self.trained if scores[..., f].isnan().all()]

    def _try(
        self, f: int, images: list, prompts: list[str], columns: dict, extras: dict, started: Future | None = None
    ) -> list[float]:
        """Scores by one function, NaN where it does not apply, after as many tries as it needs and may have."""
        for attempt in range(self.reward_retries + 1):
            try:
                future, started = started or self._start(f, images, prompts, columns, extras), None
                return self._checked(f, self._result(future), prompts)
            except Exception as error:
                failure = error
            if attempt == self.reward_retries and self.reward_on_error == "raise":
                failure.add_note(
                    f"Raised by the reward function `{self.names[f]}` for {len(prompts)} images, the first of them "
                    f"with the prompt {prompts[0]!r}."
                )
                raise failure
            # Their frames would keep the images until the garbage is collected.
            failure.__traceback__ = failure.__cause__ = failure.__context__ = None
            if attempt < self.reward_retries:
                wait = min(FIRST_BACKOFF * 2**attempt, LAST_BACKOFF)
                logger.warning(
                    "The reward function `%s` failed (%r) and is called again in %g seconds (retry %d of %d).",
                    self.names[f], failure, wait, attempt + 1, self.reward_retries,
                )  # fmt: skip
                time.sleep(wait)
        self.failures[self.names[f]] += len(prompts)
        logger.warning(
            "The reward function `%s` failed (%r): %d images have no score from it (`reward_on_error='none'`).",
            self.names[f], failure, len(prompts),
        )  # fmt: skip
        return [float("nan")] * len(prompts)

    def _start(self, f: int, images: list, prompts: list[str], columns: dict, extras: dict) -> Future:
        """Calls a function: an async one in the event loop, a sync one here, or in a thread if it can take too long."""
        func, future = self.funcs[f], Future()
        arguments = {"prompts": list(prompts), "images": own_images(images), **copy.deepcopy(columns)}
        arguments |= {name: extras[name] for name in _taken(func, extras)}
        try:
            if is_async_callable(func):
                return self._submit(func(**arguments))
            if self.reward_timeout is not None:
                return in_thread(lambda: _read(func(**arguments)))
            future.set_result(_read(func(**arguments)))
        except Exception as error:
            future.set_exception(error)
        return future

    def _submit(self, awaitable: Any) -> Future:
        """Awaits something in the event loop that all async functions share."""

        async def finish():
            try:
                return _read(await awaitable)
            except (KeyboardInterrupt, SystemExit) as error:  # would end the loop, and nobody would get an answer
                raise RuntimeError(f"It raised {error!r}.") from error

        with self._starting:  # functions that are called again after a loop was blocked do not start one each
            if self._loop is None:
                _, self._loop, ready = start_event_loop_in_daemon("flow_trl-rewards")
                ready.wait()
            return asyncio.run_coroutine_threadsafe(finish(), self._loop)

    def _result(self, future: Future) -> Any:
        try:
            result = future.result(self.reward_timeout)
        except TimeoutError:
            if future.done():  # raised by the function itself
                raise
            future.cancel()
            self._leave_blocked_loop()
            raise TimeoutError(
                f"It took longer than `reward_timeout={self.reward_timeout}` seconds: allow more, or fewer images at a "
                "time (`per_device_rollout_batch_size`)."
            ) from None
        return self._result(self._submit(result)) if inspect.isawaitable(result) else result

    def _leave_blocked_loop(self) -> None:
        """Lets a new event loop serve the next calls if an async function blocks the present one."""
        loop = self._loop
        if loop is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(timeout=1)
        except TimeoutError:
            with self._starting:
                if self._loop is loop:  # not one that another function has started meanwhile
                    self._loop = None

    def _checked(self, f: int, result: Any, prompts: list[str]) -> list[float]:
        name = self.names[f]
        try:
            if isinstance(result, str | bytes | Mapping | Set):
                raise TypeError
            result = list(result)
        except TypeError:
            raise TypeError(
                f"Reward function `{name}` returned {result!r}, a {type(result).__name__}: it must return a list with "
                f"one score for each of the {len(prompts)} images."
            ) from None
        if len(result) != len(prompts):
            raise ValueError(
                f"Reward function `{name}` returned {len(result)} scores for {len(prompts)} images: it must return one "
                "for each image (`None` where it does not apply)."
            )
        scores = []
        for index, (score, prompt) in enumerate(zip(result, prompts, strict=True)):
            if isinstance(score, torch.Tensor | np.ndarray | np.generic) and math.prod(score.shape) == 1:
                score = score.item()
            if isinstance(score, Decimal):
                score = math.nan if score.is_nan() else float(score)  # a signaling NaN is no float
            if score is not None and not isinstance(score, numbers.Real):
                raise TypeError(
                    f"Reward function `{name}` returned {score!r}, a {type(score).__name__}, for image {index} "
                    f"(prompt {prompt!r}): a score is a number, or `None` where the function does not apply."
                )
            if score is not None and not abs(score) <= torch.finfo(torch.float32).max:
                raise ValueError(
                    f"Reward function `{name}` returned {score} for image {index} (prompt {prompt!r}): a score must be "
                    "finite; return `None` where the function does not apply."
                )
            scores.append(float("nan") if score is None else float(score))
        return scores
