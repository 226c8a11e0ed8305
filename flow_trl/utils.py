"""Small helpers that several modules share."""

import hashlib
import importlib
import os
from collections import defaultdict
from types import ModuleType
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from PIL import Image


class MissingExtraError(ImportError, ValueError):
    """An optional package is needed for what was asked; the message says which extra of flow-trl installs it."""


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """
    Imports an optional dependency, or says how to install it.

    Args:
        module (`str`):
            Name of the module to import, for example `"matplotlib.pyplot"`.
        extra (`str`):
            The extra of flow-trl that installs it, for example `"plots"`.
        purpose (`str`):
            What it is needed for; the error message begins with it.

    Returns:
        `ModuleType`: the imported module.

    Raises:
        MissingExtraError: if the module cannot be imported.

    Example:

    ```python
    >>> plt = import_extra("matplotlib.pyplot", extra="plots", purpose="the learning curve")
    ```
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs `{module}`, which cannot be imported ({error}). "
            f'Install it with `pip install "flow-trl[{extra}]"`.'
        ) from error


def sample_generator(*key: Any) -> torch.Generator:
    """A generator on the CPU whose numbers depend on `key` alone, not on processes, batches or earlier draws."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; on its way from the CPU to a GPU nothing waits for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_pil(pixels: torch.Tensor) -> list:
    """
    PIL images of uint8 pixels on the CPU: of `(N, H, W, 3)` a list of N images, of `(N, frames, H, W, 3)` a list of N
    lists of frames.
    """
    if pixels.ndim == 3:
        return Image.fromarray(pixels.numpy())
    return [to_pil(part) for part in pixels]


def weights_of(name: str, denoisers: dict[str, Any], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of one denoiser among those of all, whose names begin with the denoiser's if there are several."""
    prefix = f"{name}." if len(denoisers) > 1 else ""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def check_prompts(name: str, dataset: Any) -> None:
    """
    Checks that prompts can be taken from a data set, which is called `name` in the message.

    Raises:
        TypeError, ValueError: if it is no data set, is empty, or has no column `prompt` of strings.
    """
    if isinstance(dataset, datasets.IterableDataset):
        raise TypeError(
            f"`{name}` is a streamed data set (`IterableDataset`), but rows are drawn by their number, so that a run can be "
            "shuffled, shared among processes and resumed. Load it without `streaming=True`, or keep some rows: "
            "`datasets.Dataset.from_list(list(dataset.take(10_000)))`."
        )
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"`{name}` must be a `datasets.Dataset`, not {type(dataset).__name__}: "
            "`datasets.Dataset.from_list([{'prompt': ...}, ...])` makes one."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty: it needs at least one row with a `prompt`.")
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"`{name}` has the columns {dataset.column_names} and no column `prompt`: rename one with "
            "`dataset.rename_column(..., 'prompt')`."
        )
    for index, prompt in enumerate(dataset["prompt"][:]):
        if not isinstance(prompt, str):
            raise TypeError(f"`{name}[{index}]['prompt']` is {prompt!r}: prompts must be strings.")


def check_images(name: str, dataset: datasets.Dataset, columns: list[str]) -> None:
    """
    Checks that every row of a data set, which is called `name` in the message, has the images that a pipeline is given
    (in columns of images, paths, or lists of them), without decoding them.

    Raises:
        ValueError: if a column is missing, or a row has nothing or a path without a file in it.
    """
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(f"`{name}` has no column `{column}`, which the pipeline is given: add or rename it.")
        if isinstance(dataset.features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        for index, value in enumerate(dataset.select_columns([column])):
            for entry in value[column] if isinstance(value[column], list) else [value[column]]:
                entry = entry.get("path") if isinstance(entry, dict) and not entry.get("bytes") else entry
                missing = isinstance(entry, str) and not entry.startswith("http") and not os.path.isfile(entry)
                if entry is None or missing:
                    raise ValueError(
                        f"`{name}[{index}][{column!r}]` is {entry!r}{', and there is no such file' if missing else ''}: each row "
                        "needs an image that can be read."
                    )


class Metrics(defaultdict):
    """Values of metrics since the last log, by name: numbers, or scalars that stay on their device until then."""

    def __init__(self):
        super().__init__(list)

    def record(self, metrics: dict[str, float | torch.Tensor]) -> None:
        """Adds a value to each of some metrics."""
        for name, value in metrics.items():
            self[name].append(value)

    def reduced(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over values and processes (of names that end with `max_deviation` the maximum); forgets the values."""
        names, device = sorted(self), accelerator.device

        def reduce(name: str, values: torch.Tensor) -> torch.Tensor:
            return values.max() if name.endswith("max_deviation") else values.mean()

        def stacked(values: list) -> torch.Tensor:
            is_tensor = isinstance(values[0], torch.Tensor)
            return torch.stack(values) if is_tensor else torch.tensor(values, dtype=torch.float32, device=device)

        mine = torch.stack([reduce(name, stacked(self[name])) for name in names])
        gathered = accelerator.gather(mine).view(-1, len(names)).cpu()
        self.clear()
        return {name: reduce(name, values).item() for name, values in zip(names, gathered.T, strict=True)}
