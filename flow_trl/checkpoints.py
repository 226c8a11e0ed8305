"""Checkpoints that are whole or not there: written aside, renamed, found again."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .conditioning import digest
from .generation import Generation, Sampled
from .loading import save_lora


WEIGHTS_NAME = "trained_weights.safetensors"
FSDP_WEIGHTS_NAMES = ("pytorch_model_fsdp_0", "pytorch_model_fsdp.bin")


def aside(folder: str) -> str:
    """Where the checkpoints of a folder are written; a name that is not pushed to the Hub."""
    return os.path.join(folder, "_saving")


@contextmanager
def written_aside(folder: str, name: str, accelerator: Accelerator, should_save: bool) -> Iterator[str]:
    """
    Lets all processes write a checkpoint, and only then gives it its name: whenever one is killed, every `checkpoint-*`
    folder is whole.

    Args:
        folder (`str`):
            Folder of the run.
        name (`str`):
            Name of the checkpoint.
        accelerator ([`~accelerate.Accelerator`]):
            Lets processes wait for each other.
        should_save (`bool`):
            Whether this process makes and renames folders.

    Yields:
        `str`: where to write.

    Example:

    ```python
    >>> with written_aside("outputs/run", "checkpoint-10", accelerator, should_save=True) as target:
    ...     save_file(weights, os.path.join(target, "trained_weights.safetensors"))
    ```
    """
    target, final = os.path.join(aside(folder), name), os.path.join(folder, name)
    if should_save:
        shutil.rmtree(aside(folder), ignore_errors=True)
    accelerator.wait_for_everyone()
    yield target
    accelerator.wait_for_everyone()
    if should_save:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(target, final)
        os.rmdir(aside(folder))
    accelerator.wait_for_everyone()


def newest_checkpoint(folder: str) -> str | None:
    """
    The newest checkpoint of a run that has its weights and its state.

    Args:
        folder (`str`):
            Folder of the run.

    Returns:
        `str` or `None`: its path, or `None` if there is none.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = [int(m[1]) for m in (re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", name) for name in names) if m]
    for step in sorted(steps, reverse=True):
        path = os.path.join(folder, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        found = set(os.listdir(path))
        if TRAINER_STATE_NAME in found and found & {WEIGHTS_NAME, *FSDP_WEIGHTS_NAMES}:
            return path
    return None


@torch.no_grad()
def fingerprint(weights: Iterable[torch.Tensor]) -> str:
    """A short text that differs between weights that differ (of FSDP: this process's part of them)."""
    sums = []
    for weight in weights:
        weight = weight.to_local() if hasattr(weight, "to_local") else weight.detach()
        if type(weight) is not torch.Tensor and weight.is_floating_point():  # torchao's, which cannot be summed
            weight = weight.dequantize()
        weight = weight if weight.is_floating_point() else weight.double()  # of bitsandbytes
        sums += [weight.sum(dtype=torch.float64), torch.linalg.vector_norm(weight, dtype=torch.float64)]
    return hashlib.blake2b(torch.stack(sums).cpu().numpy().tobytes(), digest_size=16).hexdigest()


class Checkpoints:
    """
    What a [`~transformers.Trainer`] of generations writes to its checkpoints and reads from them: the trained weights, their
    average, the generation that is not used up, and the state of its credit assignment (`_save_credit`, `_load_credit`).
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(self.args.output_dir) or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    _saving_checkpoint = False

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return aside(folder) if self._saving_checkpoint else folder

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
        text = json.dumps(everything, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _save_checkpoint(self, model, trial) -> None:
        folder, name = self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with written_aside(folder, name, self.accelerator, self.args.should_save) as target:
            self._saving_checkpoint = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_checkpoint = False
            if self.state.global_step % self._updates_per_generation and not self.args.save_only_model:
                self._generation.save(os.path.join(target, f"generation_{self.accelerator.process_index}.safetensors"))
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = os.path.join(folder, name)
            if self.args.should_save:
                self.state.save_to_json(os.path.join(target, TRAINER_STATE_NAME))
                if not self.is_fsdp_enabled:
                    weights = {name: weight.detach().contiguous().cpu() for name, weight in self._trained.items()}
                    totals = {name: str(total) for name, total in self._totals.items()}
                    save_file(weights, os.path.join(target, WEIGHTS_NAME), metadata=totals)
                if self.ema is not None:
                    self.ema.save(os.path.join(target, "ema_weights.safetensors"))
            self._save_credit(target)
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

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving_checkpoint:  # else `_save_checkpoint` does it when the folder has its name
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self._resumed_from, self._generation = resume_from_checkpoint, None
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        path = os.path.join(resume_from_checkpoint, WEIGHTS_NAME)
        if not os.path.isfile(path):
            raise ValueError(
                f"`resume_from_checkpoint={resume_from_checkpoint!r}` has no file `{WEIGHTS_NAME}`, so it "
                f"is not a checkpoint of {type(self).__name__}: pass a `checkpoint-*` folder of its `output_dir`."
            )
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
            self._totals = {name: int(total) for name, total in file.metadata().items()}
        if weights.keys() != self._trained.keys():
            raise ValueError(
                f"`resume_from_checkpoint={resume_from_checkpoint!r}` has {len(weights)} trained tensors, the model has "
                f"{len(self._trained)} others: use the `peft_config` of the run that wrote it."
            )
        with torch.no_grad():
            for name, weight in self._trained.items():
                weight.copy_(weights[name])
        if self.ema is not None:
            self.ema.load(os.path.join(resume_from_checkpoint, "ema_weights.safetensors"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_credit(checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
        self._load_credit(self.state.best_model_checkpoint)

    def _resume_generation(self) -> None:
        if self._resumed_from is None:
            raise ValueError(
                "`resume_from_checkpoint` was written within a generation, which does not work with DeepSpeed: resume from "
                f"a checkpoint at a multiple of {self._updates_per_generation} updates."
            )
        path = os.path.join(self._resumed_from, f"generation_{self.accelerator.process_index}.safetensors")
        generation = Generation.load(path) if os.path.isfile(path) else None
        size = self.args.generation_batch_size // self.accelerator.num_processes
        if generation is None or len(generation.rows) != size:
            found = "no file" if generation is None else f"{len(generation.rows)} images, not {size}, in"
            raise ValueError(
                f"`resume_from_checkpoint={self._resumed_from!r}` was written within a generation but has {found} "
                f"{os.path.basename(path)}: resume with the number of processes that wrote it, or from a checkpoint at "
                f"a multiple of {self._updates_per_generation} updates."
            )
        self._encode(generation.rows.tolist())
        self._set_generation(generation)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        denoisers = self.policy.denoisers
        os.makedirs(output_dir, exist_ok=True)
        with self._evaluated_weights():
            if self.is_lora:
                save_lora(self.pipe, denoisers, output_dir, state_dict)
            elif os.path.basename(output_dir).startswith(PREFIX_CHECKPOINT_DIR):
                for name, denoiser in denoisers.items():
                    denoiser.save_pretrained(os.path.join(output_dir, name))
            else:
                self.pipe.save_pretrained(output_dir)

    def _raise_together(self, sampled: Sampled | BaseException) -> None:
        """If scoring failed on one process, ends training on all, with a checkpoint from which a run goes on."""
        failure = sampled if isinstance(sampled, BaseException) else None
        failed = torch.tensor([failure is not None], device=self.accelerator.device)
        if not self.accelerator.gather(failed).any():
            return
        failure = failure or RuntimeError("A reward function failed on another process, whose log says more.")
        if self.is_in_train:
            step, remedy = self.state.global_step, "start again with the same `output_dir`"
            if step > 0:
                self._save_checkpoint(self.model_wrapped, trial=None)
                remedy = f"resume from {PREFIX_CHECKPOINT_DIR}-{step} (`trainer.train(resume_from_checkpoint=True)`)"
            failure.add_note(
                f"Nothing is lost: what was sampled is in `{self.args.output_dir}`. Mend the reward function, or allow more "
                f"(`reward_timeout`, `reward_retries`, `reward_on_error='none'`), and {remedy}."
            )
        raise failure
