"""One round of sampling and scoring: what the updates need of it, and the stream of chunks that makes it."""

import glob
import json
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import datasets
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .conditioning import Conditioning
from .policy import PipelinePolicy, Schedule
from .prompt_cache import PromptCache
from .rollout import Trajectory
from .scoring import RewardLog, Scorer, in_thread
from .utils import to_device


logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Kept = TypeVar("Kept")


class MicroBatch(NamedTuple):
    """What the loss needs of n images at one step: tensors of shape `(n, ...)` on the trainer's device."""

    latents: torch.Tensor
    next_latents: torch.Tensor
    log_probs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor


@dataclass
class Generation:
    """
    This process's share of one round of sampling: n images with K trained steps, in U updates. It waits on the CPU.

    Args:
        rows (`torch.Tensor` of shape `(n,)`): row of each image's prompt in the data set.
        latents (`torch.Tensor` of shape `(n, K + 1, ...)`): as in [`~flow_trl.rollout.Trajectory`].
        log_probs (`torch.Tensor` of shape `(n, K)`): as in [`~flow_trl.rollout.Trajectory`].
        advantages (`torch.Tensor` of shape `(n, K)`): advantage of each step.
        weights (`torch.Tensor` of shape `(n,)`): weight of each image in its update's loss, 0 if it is skipped.
        order (`torch.Tensor` of shape `(U, n / U)`): images of each update; skipped ones (of groups in which every
            advantage is 0) come first.
        skipped (`torch.Tensor` of shape `(U,)`): leading images of each update that no process needs to evaluate.
        timesteps, sigmas (`torch.Tensor`): the schedule.
        first_step (`torch.Tensor` of shape `()`): index of the first trained step.
    """

    rows: torch.Tensor
    latents: torch.Tensor
    log_probs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    order: torch.Tensor
    skipped: torch.Tensor
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    first_step: torch.Tensor

    @classmethod
    def make(
        cls,
        rows: list[int],
        trajectory: Trajectory,
        advantages: torch.Tensor,
        *,
        num_generations: int,
        updates: int,
        process_index: int,
    ) -> "Generation":
        """
        Splits a generation into updates, of the same images whatever the number of processes: from the rows and
        trajectories (on the CPU) of this process's n images, and the advantages (N, K) of all processes' images, in
        groups of `num_generations`.
        """
        size, first = len(rows), process_index * len(rows)
        groups = advantages.view(-1, num_generations * advantages.shape[1])
        active = (groups != 0).any(dim=1).repeat_interleave(num_generations)
        update_of = torch.arange(len(advantages)) % updates
        weights = torch.zeros(len(advantages))
        order, skipped = [], []
        for update in range(updates):
            members = (update_of == update).view(-1, size)  # (processes, n)
            taken = (update_of == update) & active
            weights[taken] = (update_of == update).sum() / taken.sum().clamp(min=1)
            skipped.append((members & ~active.view(-1, size)).sum(dim=1).min().item())
            mine = members[process_index].nonzero().flatten()
            order.append(mine[active[first:][mine].argsort(stable=True)])
        schedule = trajectory.schedule
        return cls(
            rows=torch.tensor(rows),
            latents=trajectory.latents,
            log_probs=trajectory.log_probs,
            advantages=advantages[first : first + size],
            weights=weights[first : first + size],
            order=torch.stack(order),
            skipped=torch.tensor(skipped),
            timesteps=schedule.timesteps.cpu(),
            sigmas=torch.empty(0) if schedule.sigmas is None else schedule.sigmas,
            first_step=torch.tensor(trajectory.steps.start),
        )

    def micro_batch(self, images: torch.Tensor, k: int, device: torch.device) -> MicroBatch:
        """What the loss needs of some images at trained step k (0 to K - 1)."""
        tensors = (self.latents[images, k], self.latents[images, k + 1], self.log_probs[images, k])
        return MicroBatch(
            *(to_device(t, device) for t in (*tensors, self.advantages[images, k], self.weights[images]))
        )

    def schedule(self, device: torch.device) -> Schedule:
        """The schedule, its timesteps on a device."""
        return Schedule(self.timesteps.to(device), self.sigmas if self.sigmas.numel() else None)

    def save(self, path: str) -> None:
        """Writes the generation to a safetensors file."""
        save_file({name: tensor.contiguous() for name, tensor in vars(self).items()}, path)

    @classmethod
    def load(cls, path: str) -> "Generation":
        """Reads what `save` wrote."""
        return cls(**load_file(path))


class Chunk(NamedTuple):
    """Some of this process's images, which are sampled, decoded and scored together: the first one's place, their rows."""

    first: int
    rows: list[int]


def split(rows: list[int], size: int) -> list[Chunk]:
    """Chunks of `size` images; the last one may have fewer."""
    return [Chunk(first, rows[first : first + size]) for first in range(0, len(rows), size)]


class Stopwatch(defaultdict):
    """Seconds by name: `with stopwatch("sampling"): ...` adds to `stopwatch["sampling"]`."""

    def __init__(self):
        super().__init__(float)

    @contextmanager
    def __call__(self, name: str):
        started = time.perf_counter()
        try:
            yield
        finally:
            self[name] += time.perf_counter() - started


def stream(
    items: Iterable[Item],
    make: Callable[[Item], tuple[Kept, Any]],
    score: Callable[[Item, Any], Any],
    *,
    overlap: bool = True,
    stopwatch: Stopwatch | None = None,
) -> Iterator[tuple[Kept, Future]]:
    """
    Makes the images of one item after another and scores them; while those of one are scored in a thread, those of the
    next are made. The images of at most two items exist at once. Order and results do not depend on the thread.

    Args:
        items (`Iterable`):
            What images are made of, chunks for example.
        make (`Callable`):
            Called with an item, returns what is kept of it and its images.
        score (`Callable`):
            Called with an item and its images.
        overlap (`bool`, *optional*, defaults to `True`):
            Whether to score in a thread. Otherwise nothing is made while images are scored.
        stopwatch ([`Stopwatch`], *optional*):
            Gets the seconds of scoring (`"reward"`) and those for which scores had to be waited (`"reward_wait"`).

    Yields:
        `tuple`: what is kept of an item, and a future, done, with what `score` returned or raised.

    Example:

    ```python
    >>> for trajectory, scores in stream(split(rows, 16), sample_and_decode, score):
    ...     rewards.append(scores.result())
    ```
    """
    stopwatch = Stopwatch() if stopwatch is None else stopwatch

    def timed(item: Item, images: Any) -> Any:
        with stopwatch("reward"):
            return score(item, images)

    def start(item: Item, images: Any) -> Future:
        if overlap:
            return in_thread(partial(timed, item, images))
        future = Future()
        try:
            with stopwatch("reward_wait"):
                future.set_result(timed(item, images))
        except Exception as error:
            future.set_exception(error)
        return future

    def finish() -> Iterator[tuple[Kept, Future]]:
        while started:
            with stopwatch("reward_wait"):
                wait([started[0][1]])
            yield started.pop()

    started: list[tuple[Kept, Future]] = []  # the one that is being scored
    for item in items:
        kept, images = make(item)
        yield from finish()
        started.append((kept, start(item, images)))
        del images  # the scoring thread has the only reference
        if not overlap:
            yield from finish()
    yield from finish()


class SampledChunks:
    """
    Sampled trajectories on disk until their generation is scored, so that an interrupted run need not sample them again.

    Args:
        folder (`str`):
            Folder of the run.
        process_index (`int`):
            Number of this process.
        key (`str`):
            Everything that the samples depend on. Files with another key are not read.

    Example:

    ```python
    >>> sampled = SampledChunks("outputs/run", 0, key)
    >>> sampled.save(chunk, trajectory, evaluations=55 * len(chunk.rows))
    >>> trajectory, evaluations = sampled.load(chunk)
    >>> sampled.clear()  # when the generation is scored
    ```
    """

    def __init__(self, folder: str, process_index: int, key: str):
        self.folder = os.path.join(folder, "_sampled")  # a name that is not pushed to the Hub
        self.prefix, self.key = f"process_{process_index}_", key

    def _path(self, chunk: Chunk) -> str:
        return os.path.join(self.folder, f"{self.prefix}{chunk.first:06d}.safetensors")

    def load(self, chunk: Chunk) -> tuple[Trajectory, int] | None:
        """The trajectories of a chunk and what they cost, or `None` if they are not on disk."""
        try:
            with safe_open(self._path(chunk), framework="pt") as file:
                metadata = file.metadata()
                if metadata["key"] != self.key or json.loads(metadata["rows"]) != chunk.rows:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError):
            return None
        schedule = Schedule(tensors.pop("timesteps"), tensors.pop("sigmas", None))
        trajectory = Trajectory(**tensors, schedule=schedule, steps=range(*json.loads(metadata["steps"])))
        return trajectory, int(metadata["evaluations"])

    def save(self, chunk: Chunk, trajectory: Trajectory, evaluations: int) -> None:
        """Writes the trajectories of a chunk, which must be on the CPU, and what they cost."""
        os.makedirs(self.folder, exist_ok=True)
        tensors = {name: getattr(trajectory, name) for name in ("latents", "log_probs", "finals")}
        tensors |= {name: value for name, value in trajectory.schedule._asdict().items() if value is not None}
        metadata = {
            "key": self.key,
            "rows": json.dumps(chunk.rows),
            "steps": json.dumps([trajectory.steps.start, trajectory.steps.stop]),
            "evaluations": str(evaluations),
        }
        path = self._path(chunk)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path + ".part", metadata)
        os.replace(path + ".part", path)

    def clear(self) -> None:
        """Deletes the files of this process."""
        for path in glob.glob(os.path.join(glob.escape(self.folder), f"{self.prefix}*")):
            os.remove(path)
        with suppress(OSError):  # of other processes there are files yet, or the folder is gone
            os.rmdir(self.folder)


@dataclass
class Sampled:
    """
    Scored images of one process, and what they came from.

    Args:
        trajectory ([`~flow_trl.rollout.Trajectory`]): their trajectories, on the CPU, without the final latents.
        scores (`torch.Tensor` of shape `(n, M, F)`): scores of the M final images of each; NaN where a function was not
            asked or does not apply.
        images (`list[torch.Tensor]`): pixels of the first finished images, see [`~flow_trl.utils.to_pil`].
        evaluations (`int`): how often the denoiser was evaluated.
        log ([`~flow_trl.scoring.RewardLog`]): what reward functions logged.
        failed (`Counter[str]`): for how many images a function failed, by its name.
        seconds ([`Stopwatch`]): seconds of sampling, decoding and scoring, and those of waiting for scores.
    """

    trajectory: Trajectory
    scores: torch.Tensor
    images: list[torch.Tensor]
    evaluations: int
    log: RewardLog
    failed: Counter
    seconds: Stopwatch

    def logged(self) -> dict[str, float]:
        """Means over all processes of what reward functions logged, and the share of images for which they failed."""
        asked = self.scores.shape[0] * self.scores.shape[1]
        values = defaultdict(list)
        for metrics, failed in gather_object([(dict(self.log.metrics), dict(self.failed))]):
            for name, logged in metrics.items():
                values[name] += logged
            for name, count in failed.items():
                values[f"rewards/{name}/failed"].append(count / asked)
        return {name: sum(v) / len(v) for name, v in sorted(values.items())}

    def columns(self) -> dict[str, list]:
        """What reward functions gave to `log_extra`, for the images of all processes."""
        size = len(self.scores)
        for column, values in self.log.columns.items():
            if len(values) != size:
                logger.warning(
                    "`log_extra(%r, ...)` gave %d values for %d images: left out.", column, len(values), size
                )
        columns = gather_object([{name: v for name, v in self.log.columns.items() if len(v) == size}])
        names = sorted(set().union(*columns))
        return {name: [value for part in columns for value in part.get(name, [None] * size)] for name in names}


class Sampler:
    """
    Samples, decodes and scores the prompts of a data set, chunk by chunk. Of a generation only scores and trained latents
    are kept, so memory is that of two chunks.

    Args:
        policy ([`~flow_trl.PipelinePolicy`]):
            The policy. Each prompt is embedded once.
        scorer ([`~flow_trl.scoring.Scorer`]):
            The reward functions.
        overlap (`bool`):
            See [`stream`].
        columns (`list[str]`):
            Columns of the data set, beside `prompt`, that the pipeline is given for each prompt.
    """

    def __init__(self, policy: PipelinePolicy, scorer: Scorer, overlap: bool, columns: list[str]):
        self.policy, self.scorer, self.overlap, self.columns = policy, scorer, overlap, columns
        self._prompts = PromptCache(policy)

    def encode(self, dataset: datasets.Dataset, rows: list[int]) -> tuple[Conditioning, list[int]]:
        """Conditioning of the distinct rows of a data set, on the CPU, and the index of each of `rows` in it."""
        distinct = {row: index for index, row in enumerate(dict.fromkeys(rows))}
        examples = dataset.select_columns(["prompt", *self.columns])[list(distinct)]
        return self._prompts.encode(examples.pop("prompt"), **examples), [distinct[row] for row in rows]

    def __call__(
        self,
        dataset: datasets.Dataset,
        rows: list[int],
        sample: Callable[[Chunk, Conditioning, list[int]], Trajectory],
        *,
        batch_size: int,
        decode_batch_size: int | None = None,
        decode_dtype: torch.dtype | None = None,
        sampled_chunks: SampledChunks | None = None,
        finished_functions: list[int] | None = None,
        num_images: int = 0,
        trainer_state: Any = None,
        bar: tqdm | None = None,
    ) -> Sampled:
        """
        Scored images.

        Args:
            dataset ([`~datasets.Dataset`]):
                The data set.
            rows (`list[int]`):
                n rows of it.
            sample (`Callable`):
                Samples a chunk, from the conditioning of distinct prompts and the chunk's indices in it.
            batch_size (`int`):
                Images per chunk.
            decode_batch_size (`int`, *optional*):
                Images per call of the decoder. If not set, `batch_size`.
            decode_dtype (`torch.dtype`, *optional*):
                Type in which the decoder computes (autocast). If not set, its own.
            sampled_chunks ([`SampledChunks`], *optional*):
                Where samples are looked for, and kept until their images are scored.
            finished_functions (`list[int]`, *optional*):
                Functions that score the finished images, all if not set; completions are scored by those that are
                trained.
            num_images (`int`, *optional*, defaults to `0`):
                Number of finished images that are kept.
            trainer_state ([`~transformers.TrainerState`], *optional*):
                Goes to the reward functions.
            bar ([`~tqdm.tqdm`], *optional*):
                Progress bar, which counts images that were sampled.

        Returns:
            [`Sampled`]

        Raises:
            ScoringError: if a reward function failed, from its error.
        """
        log, seconds, shown = RewardLog(), Stopwatch(), []
        failures, evaluations = Counter(self.scorer.failures), 0

        def make(chunk: Chunk) -> tuple[Trajectory, torch.Tensor]:
            nonlocal evaluations
            conditioning, index = self.encode(dataset, chunk.rows)
            with seconds("sampling"):
                known = sampled_chunks.load(chunk) if sampled_chunks else None
                if known is None:
                    before = self.policy.evaluations
                    known = sample(chunk, conditioning, index).cpu(), self.policy.evaluations - before
                    if sampled_chunks:
                        sampled_chunks.save(chunk, *known)
            trajectory, cost = known
            evaluations += cost
            with seconds("decoding"):
                images = self._decode(
                    trajectory.finals, conditioning, index, decode_batch_size or batch_size, decode_dtype
                )
            if bar is not None:
                bar.update(len(chunk.rows))
            shown.extend(images[-1, : num_images - len(shown)].clone() if len(shown) < num_images else [])
            finals = trajectory.finals[:0].clone()  # a view would keep them all
            return trajectory._replace(finals=finals), images

        def score(chunk: Chunk, images: torch.Tensor) -> torch.Tensor:
            examples, scores = _rows(dataset, chunk.rows), []
            prompts = examples.pop("prompt")
            for k, part in enumerate(images):
                finished = k == len(images) - 1
                functions = finished_functions if finished else self.scorer.trained
                extras = log.extras(trainer_state, columns=finished)
                scores.append(self.scorer(part, prompts, examples, functions=functions, extras=extras))
            return torch.stack(scores, dim=1)

        chunks, trajectories, scores = split(rows, batch_size), [], []
        for trajectory, future in stream(chunks, make, score, overlap=self.overlap, stopwatch=seconds):
            if future.exception() is not None:
                raise ScoringError from future.exception()
            trajectories.append(trajectory)
            scores.append(future.result())
        failed = self.scorer.failures - failures
        return Sampled(Trajectory.join(trajectories), torch.cat(scores), shown, evaluations, log, failed, seconds)

    def _decode(
        self,
        finals: torch.Tensor,
        conditioning: Conditioning,
        index: list[int],
        size: int,
        dtype: torch.dtype | None,
    ) -> torch.Tensor:
        """Pixels (M, n, ...) of final latents (M, n, ...), on the CPU."""
        device, latents, pixels = self.policy.device, finals.flatten(0, 1), None
        for rows in torch.arange(len(latents)).split(size):
            conditioned = conditioning.on(device, [index[row % len(index)] for row in rows.tolist()])
            with torch.autocast(device.type, dtype) if dtype else nullcontext():
                part = self.policy.decode(latents[rows], conditioned, output_type="uint8")
            if pixels is None:  # written in place, so that the chunk exists once
                pixels = part.new_empty(len(latents), *part.shape[1:])
            pixels[rows] = part
        return pixels.unflatten(0, finals.shape[:2])


def _rows(dataset: datasets.Dataset, rows: list[int]) -> dict[str, list]:
    """Columns of some rows, each distinct one read once."""
    place = {row: i for i, row in enumerate(dict.fromkeys(rows))}
    return {name: [values[place[row]] for row in rows] for name, values in dataset[list(place)].items()}


class ScoringError(Exception):
    """A reward function failed; its own error is the cause."""
