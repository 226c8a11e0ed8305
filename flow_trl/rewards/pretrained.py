"""Pretrained models and weights, from here or from the Hub, or an error that says what would work."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, PreTrainedConfig


NETWORK = "downloaded the first time, for which the network is needed"


@contextmanager
def loading(model: str | Path, kind: str, example: str, others: str) -> Iterator[None]:
    """Says in place of an error within that no `kind` can be loaded from `model`, and what else can be passed."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f'`model` is "{model}", from which no {kind} can be loaded ({error}). Pass the Hub id of one, such as '
            f'"{example}" ({NETWORK}), {others}.'
        ) from error


def load_config(model: str | Path, kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The configuration of a model of this kind; of any other the model's class would take random weights."""
    config = AutoConfig.from_pretrained(model)
    if not isinstance(config, kind):
        raise ValueError(f'it is of the type "{config.model_type}"')
    return config


def find_file(name: str | Path, argument: str, example: str) -> Path:
    """The path of a file here, or of `"owner/repository/file"` from the Hub; the rest is for the error."""
    path = Path(name)
    if path.is_file():
        return path
    owner, repository, file = [*path.as_posix().split("/", 2), "", ""][:3]
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file))
    except (OSError, ValueError) as error:
        raise ValueError(
            f'`{argument}` is "{name}", which is no file here, and cannot be had from the Hub ({error}). Pass the path '
            f'of a file, or "owner/repository/file" such as "{example}" ({NETWORK}).'
        ) from error


def refuse_differences(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], problem: str) -> None:
    """Raises an error that begins with `problem` if weights differ in names or shapes."""
    wanted, given = ({name: tuple(weight.shape) for name, weight in weights.items()} for weights in (expected, found))
    differences = [
        f"`{name}` is {given.get(name, 'missing')}, not {wanted.get(name, 'expected')}"
        for name in wanted | given
        if wanted.get(name) != given.get(name)
    ]
    if differences:
        more = f" and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise ValueError(f"{problem}: {'; '.join(differences[:10])}{more}.")
