"""Checkpoints that are whole or not there: written aside, sealed, renamed, verified, found again."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from .conditioning import digest
from .engines import assign, whole, with_weights
from .generation import Generation, Sampled, Sampler, ScoringError
from .loading import active_adapter, save_lora
from .preemption import Preempted, Preemption
from .resuming import (
    REFUSED_WITHIN,
    SCHEDULE,
    adapter,
    arguments,
    as_json,
    dataset_digest,
    described,
    differences,
    fingerprint,
    plain,
    sampled_digest,
    versions,
)  # fmt: skip


logger = logging.get_logger(__name__)

WEIGHTS_NAME, AVERAGES_NAME = "trained_weights.safetensors", "ema_weights.safetensors"
MANIFEST_NAME, RUN_NAME = "manifest.json", "run.json"


def aside(folder: str) -> str:
    """Where the checkpoints of a folder are written; a name that is not pushed to the Hub."""
    return os.path.join(folder, "_saving")


@contextmanager
def written_aside(folder: str, name: str, accelerator: Accelerator, should_save: bool) -> Iterator[str]:
    """
    Lets all processes write a checkpoint to the folder that it yields, adds a manifest, and only then, when all of it
    is on the disk, gives it its name (by the process that has `should_save`): whenever a process is killed or the
    power fails, every `checkpoint-*` folder is whole.

    Example:

    ```python
    >>> with written_aside("outputs/run", "checkpoint-10", accelerator, should_save=True) as target:
    ...     save_file(weights, os.path.join(target, "trained_weights.safetensors"))
    >>> damage("outputs/run/checkpoint-10") is None
    True
    ```
    """
    target, final = os.path.join(aside(folder), name), os.path.join(folder, name)
    if should_save:
        shutil.rmtree(aside(folder), ignore_errors=True)
    accelerator.wait_for_everyone()
    yield target
    accelerator.wait_for_everyone()
    if should_save:
        seal(target)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(target, final)
        os.rmdir(aside(folder))
        _sync(folder)
    accelerator.wait_for_everyone()


def _sync(path: str) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(folder: str, name: str) -> Any:
    with open(os.path.join(folder, name)) as file:
        return json.load(file)


def seal(folder: str) -> None:
    """Writes size and SHA-256 of each file of a folder to its `manifest.json`, and all of it to the disk."""
    manifest = os.path.join(folder, MANIFEST_NAME)
    paths = {os.path.join(place, name) for place, _, names in os.walk(folder) for name in names} - {manifest}
    files = {
        os.path.relpath(path, folder): {"bytes": os.path.getsize(path), "sha256": _checksum(path)}
        for path in sorted(paths)
    }
    with open(manifest, "w") as file:
        json.dump({"files": files}, file, indent=1)
    for path in [*paths, manifest, *(place for place, _, _ in os.walk(folder))]:
        _sync(path)


def damage(folder: str) -> str | None:
    """
    The file of a checkpoint that is missing or damaged by its manifest, in words; `None` if the checkpoint is whole.

    Example:

    ```python
    >>> damage("outputs/run/checkpoint-10")
    'its file `optimizer.pt` is missing'
    ```
    """
    try:
        known = _read(folder, MANIFEST_NAME)["files"]
        files = {name: (file["bytes"], file["sha256"]) for name, file in known.items()}
    except OSError:
        return f"it has no file `{MANIFEST_NAME}`"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its file `{MANIFEST_NAME}` is damaged"
    for name, (expected, checksum) in files.items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            return f"its file `{name}` is missing"
        size = os.path.getsize(path)
        if size != expected:
            return f"its file `{name}` is damaged: it has {size} bytes, not {expected}"
        if _checksum(path) != checksum:
            return f"its file `{name}` is damaged: its checksum is not the one of the manifest"
    return None


def checkpoints_of(folder: str) -> list[str]:
    """The `checkpoint-*` folders of a run, the newest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = [int(m[1]) for m in (re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", name) for name in names) if m]
    return [os.path.join(folder, f"{PREFIX_CHECKPOINT_DIR}-{step}") for step in sorted(steps, reverse=True)]


class WholeCheckpoints:
    """
    A [`~transformers.Trainer`] whose checkpoints are whole or not there, say what run they belong to, and are verified
    before a run goes on from them; and which writes one when it is told to end (`SIGTERM`, Ctrl-C). A subclass says
    how many updates a generation has (`_updates_per_generation`).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        meets_while_sampling = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.preemption = Preemption(self.accelerator, interrupts=not meets_while_sampling)
        self.preemption.take_over(self.pop_callback(JITCheckpointCallback))
        self.add_callback(self.preemption)
        self._saving_checkpoint = self._evaluation_due = self._has_new_schedule = False
        self._saved_step: int | None = None
        self._run: dict[str, Any] = {}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        As [`~transformers.Trainer.train`]. `SIGTERM` or Ctrl-C ends sampling and scoring at once, or an update when it is
        done; then a checkpoint is written, from which a run goes on as if nothing had been, and the process exits.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A `checkpoint-*` folder, or `True` for the newest one in `output_dir` that is whole.

        Raises:
            ValueError: if a checkpoint is damaged, or was written by a run with settings that must not change.
            SystemExit: after a signal, with the code 128 + its number, when the checkpoint is written.
        """
        if self.args.should_save:
            self._run = self._run or self._known()
            self._run |= arguments(self.args) | versions() | {"processes": self.accelerator.num_processes}
        self._evaluation_due, self._saved_step = False, None
        if resume_from_checkpoint in ("True", "true"):  # from a command line
            resume_from_checkpoint = True
        resumed = self._checked(resume_from_checkpoint) if resume_from_checkpoint else None
        with self.preemption.watching():
            return super().train(resumed, *args, **kwargs)

    def _known(self) -> dict[str, Any]:
        """What a checkpoint says of its run, beside its arguments."""
        return {"trainer": type(self).__name__, "train_dataset": dataset_digest(self.train_dataset)}

    def _checked(self, resume_from_checkpoint: str | bool) -> str:
        """The checkpoint from which this run goes on; what it says is read by one process."""
        path, applied, error = None, [], None
        if self.accelerator.is_main_process:
            try:
                path = self._choose(resume_from_checkpoint)
                applied = self._compared(path, resume_from_checkpoint)
            except ValueError as raised:
                error = raised
        path, applied, error = broadcast_object_list([path, applied, error])
        if error is not None:
            raise error
        self._has_new_schedule = not SCHEDULE.isdisjoint(applied)
        state = _read(path, TRAINER_STATE_NAME)
        control = state["stateful_callbacks"].get("TrainerControl", {}).get("args", {})
        self._evaluation_due = control.get("should_evaluate", False) and self.eval_dataset is not None
        if os.path.dirname(os.path.abspath(path)) == os.path.abspath(self.args.output_dir):
            self._saved_step = state["global_step"]
        return path

    def _choose(self, resume_from_checkpoint: str | bool) -> str:
        """A whole checkpoint from which this trainer can go on."""
        given = f"`resume_from_checkpoint={resume_from_checkpoint!r}`"
        folder = self.args.output_dir
        paths = checkpoints_of(folder) if resume_from_checkpoint is True else [resume_from_checkpoint]
        if not paths:
            raise ValueError(f"{given}: No valid checkpoint found in output directory ({folder}).")
        damages = []
        for path in paths:
            wrong = damage(path)
            if wrong is None and not _read(path, RUN_NAME)["save_only_model"]:
                break
            wrong = wrong or "it was written with `save_only_model=True`, without the optimizer's state"
            damages.append(f"{os.path.basename(path)}: {wrong}" if resume_from_checkpoint is True else wrong)
        else:
            raise ValueError(
                f"{given} is not a whole checkpoint of {type(self).__name__}: {'; '.join(damages)}. To go on, pass a "
                "`checkpoint-*` folder of its `output_dir` that is whole; `resume_from_checkpoint=True` looks for one."
            )
        if damages:
            logger.warning(
                "%s goes on from %s, because later ones are not whole: %s.", given, path, "; ".join(damages)
            )
        if self._reads_pickles and not self.args.trust_checkpoint:
            raise ValueError(
                f"{given}: DeepSpeed and sharded FSDP read pickles from a checkpoint, which can run any code. If you know that this one "
                "is your own, set `trust_checkpoint=True`."
            )
        return path

    @property
    def _reads_pickles(self) -> bool:
        return self.is_deepspeed_enabled or (
            self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        )

    def _compared(self, path: str, resume_from_checkpoint: str | bool) -> list[str]:
        """Raises if the run of a checkpoint had settings that must not change; says which others have changed."""
        old = _read(path, RUN_NAME)["run"]
        within = _read(path, TRAINER_STATE_NAME)["global_step"] % self._updates_per_generation > 0
        refused, applied = differences(old, self._run, within_generation=within)
        if refused:
            place = " within a generation" if within and REFUSED_WITHIN & set(refused) else ""
            raise ValueError(
                f"`resume_from_checkpoint={resume_from_checkpoint!r}` was written{place} by a run with other "
                f"settings: {described(refused, old, self._run)}. Use the old ones, or begin a new run with the model "
                "that this one saved."
            )
        if applied:
            words = described(applied, old, self._run)
            logger.warning("This run goes on with other settings than those of %s: %s.", path, words)
        return applied

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        groups, scheduler = self.optimizer.param_groups, self.lr_scheduler
        rates = [group.get("initial_lr", group["lr"]) for group in groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._has_new_schedule:
            return
        factors = [1.0] * len(rates)
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = rates
            factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        now = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
        for group, rate, lr in zip(self.optimizer.param_groups, rates, now, strict=True):
            group["initial_lr"], group["lr"] = rate, lr
        scheduler._last_lr = now

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return aside(folder) if self._saving_checkpoint else folder

    def _save_checkpoint(self, model, trial) -> None:
        folder, name = self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with written_aside(folder, name, self.accelerator, self.args.should_save) as target:
            self._saving_checkpoint = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_checkpoint = False
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = os.path.join(folder, name)
            if self.args.should_save:
                self.state.save_to_json(os.path.join(target, TRAINER_STATE_NAME))
                with open(os.path.join(target, RUN_NAME), "w") as file:
                    json.dump({"save_only_model": self.args.save_only_model, "run": self._run}, file, indent=1)
            self._save_more(target)
        if not self.args.save_only_model:
            self._saved_step = self.state.global_step
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=folder,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(folder, name))

    def _save_more(self, folder: str) -> None:
        """Adds to a checkpoint what [`~transformers.Trainer`] does not know."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving_checkpoint:  # else `_save_checkpoint` does it when the folder has its name
            super()._push_from_checkpoint(checkpoint_folder)

    # A signal

    def _save_now(self) -> None:
        """Leaves a checkpoint from which this run can go on, unless there is one of this update."""
        if self.state.global_step and self._saved_step != self.state.global_step:
            self.args.save_only_model = False
            self._save_checkpoint(self.model_wrapped, trial=None)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.preemption.is_due:
            self._leave()

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:  # the run that wrote the checkpoint was at its end
            self.control.should_training_stop = True

    def _leave(self) -> None:
        """Ends the process after a signal, with a checkpoint."""
        self._save_now()
        self.callback_handler.on_train_end(self.args, self.state, self.control)
        step, folder = self.state.global_step, self.args.output_dir
        where = f"`{os.path.join(folder, f'{PREFIX_CHECKPOINT_DIR}-{step}')}` is whole: go on with `trainer.train(resume_from_checkpoint=True)`"
        if not step:
            where = f"no update was done yet, and what was sampled is kept: start again with the same `output_dir={folder!r}`"
        if self.is_world_process_zero():
            logger.warning("Training was ended by a signal after %d updates; %s.", step, where)
        raise Preempted(self.preemption.exit_code)


class Checkpoints(WholeCheckpoints):
    """
    What a trainer of generations writes to its checkpoints and reads from them: the trained weights, their average, the
    generation that is not used up, and the state of its credit assignment (`_save_credit`, `_load_credit`).
    """

    _reads_pickles = False

    def _known(self) -> dict[str, Any]:
        modules = [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]
        frozen = [weight for module in modules for weight in module.parameters() if not weight.requires_grad]
        if not self.is_lora and self._reference is not None:  # a copy of the initial weights
            frozen += self._trained.values()
        denoiser = next(iter(self.policy.denoisers.values()))
        lora = denoiser.peft_config[active_adapter(denoiser)] if self.is_lora else None
        scheduler = {name: value for name, value in self.pipe.scheduler.config.items() if name[0] != "_"}
        return super()._known() | adapter(lora) | {
            "model": self.model_name,
            "base_weights": sampled_digest(frozen),
            "scheduler": as_json(scheduler),
            "reward_funcs": [self.scorer.names[f] for f in self.scorer.trained],
        }  # fmt: skip

    def _make_up_evaluation(self) -> None:
        """The evaluation that belongs to the checkpoint from which this run goes on, if a signal ended it."""
        if self._evaluation_due:
            self._evaluation_due = False
            self._determine_best_metric(self._evaluate(None, None), trial=None)
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = self._resumed_from

    def get_batch_samples(self, *args, **kwargs):
        self._make_up_evaluation()
        return super().get_batch_samples(*args, **kwargs)

    def _finalize_training(self, *args, **kwargs):
        self._make_up_evaluation()
        return super()._finalize_training(*args, **kwargs)

    def _sampling_key(self, step: int) -> str:
        """A short text of all that the samples of a generation depend on."""
        denoiser = self.policy.denoiser
        adapters = {
            name: {adapter: config.to_dict() for adapter, config in getattr(part, "peft_config", {}).items()}
            for name, part in self.policy.denoisers.items()
        }
        everything = [
            step,
            self.model_name,
            self.args.sampling_arguments,
            adapters,
            fingerprint(denoiser.parameters()),
            [(row.prompt, digest(list(row.given.values()))) for row in self._conditioning.rows],
        ]
        return hashlib.blake2b(json.dumps(everything, default=plain).encode(), digest_size=16).hexdigest()

    def _save_more(self, folder: str) -> None:
        if self.state.global_step % self._updates_per_generation and not self.args.save_only_model:
            self._generation.save(os.path.join(folder, f"generation_{self.accelerator.process_index}.safetensors"))
        averages = self.ema.averages if self.ema is not None else {}
        for name, tensors in ((WEIGHTS_NAME, self._trained), (AVERAGES_NAME, averages)):
            tensors = {key: whole(tensor).contiguous().cpu() for key, tensor in tensors.items()}
            if tensors and self.args.should_save:
                totals = {key: str(total) for key, total in self._totals.items()}
                save_file(tensors, os.path.join(folder, name), metadata=totals)
        self._save_credit(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self._resumed_from, self._generation = resume_from_checkpoint, None
        path = os.path.join(resume_from_checkpoint, WEIGHTS_NAME)
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
            self._totals = {name: int(total) for name, total in file.metadata().items()}
        if weights.keys() != self._trained.keys():
            raise ValueError(
                f"`resume_from_checkpoint={resume_from_checkpoint!r}` has {len(weights)} trained tensors, the model has "
                f"{len(self._trained)} others: use the `peft_config` of the run that wrote it."
            )
        for name, weight in self._trained.items():
            assign(weight, weights[name])
        self._reshard()
        if self.ema is not None:
            self.ema.load(os.path.join(resume_from_checkpoint, AVERAGES_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_credit(checkpoint)

    def _load_best_model(self) -> None:
        path = self.state.best_model_checkpoint
        wrong = damage(path)
        if wrong is not None:
            raise ValueError(f"`load_best_model_at_end=True`: {path} is the best checkpoint, but {wrong}.")
        self._load_from_checkpoint(path)
        self._load_credit(path)

    def _resume_generation(self) -> None:
        name = f"generation_{self.accelerator.process_index}.safetensors"
        generation = Generation.load(os.path.join(self._resumed_from, name))
        self._encode(generation.rows.tolist())
        self._set_generation(generation)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        denoisers = self.policy.denoisers
        os.makedirs(output_dir, exist_ok=True)
        with nullcontext() if state_dict is not None else self._evaluated_weights():
            if self.is_lora:
                save_lora(self.pipe, denoisers, output_dir, state_dict)
                return
            with with_weights(self.pipe, denoisers, state_dict) as denoisers:
                if os.path.basename(output_dir).startswith(PREFIX_CHECKPOINT_DIR):
                    for name, denoiser in denoisers.items():
                        denoiser.save_pretrained(os.path.join(output_dir, name))
                else:
                    self.pipe.save_pretrained(output_dir)

    def _scored(self, sampler: Sampler, *args, **kwargs) -> Sampled | BaseException:
        """What a sampler makes, or the error of a reward function or [`Preempted`]."""
        self._place_denoiser()
        description = "Sampling" if sampler is self._sampler else "Evaluating"
        kwargs |= {"decode_batch_size": self.args.per_device_decode_batch_size, "trainer_state": self.state}
        with self.console.progress(len(args[1]), description) as bar:
            try:
                with self.preemption.interruptible():
                    return sampler(*args, bar=bar, **kwargs)
            except (ScoringError, Preempted) as error:
                return error.__cause__ or error

    def _raise_together(self, sampled: Sampled | BaseException) -> None:
        """If scoring failed or a signal came on one process, ends training on all, with a checkpoint from which a run goes on."""
        failure = sampled if isinstance(sampled, BaseException) else None
        kind = 2 * isinstance(failure, Preempted) or int(failure is not None)
        kind = self.accelerator.gather(torch.tensor([kind], device=self.accelerator.device)).max().item()
        if kind == 0:
            return
        if kind == 2:
            self._leave()
        failure = failure or RuntimeError("A reward function failed on another process, whose log says more.")
        if self.is_in_train:
            self._save_now()
            step, remedy = self.state.global_step, "start again with the same `output_dir`"
            if step > 0:
                remedy = f"resume from {PREFIX_CHECKPOINT_DIR}-{step} (`trainer.train(resume_from_checkpoint=True)`)"
            failure.add_note(
                f"Nothing is lost: what was sampled is in `{self.args.output_dir}`. Mend the reward function, or allow more "
                f"(`reward_timeout`, `reward_retries`, `reward_on_error='none'`), and {remedy}."
            )
        raise failure
