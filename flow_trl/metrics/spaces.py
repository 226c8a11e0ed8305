"""Metrics as Spaces of the Hub: the app that shows one, and what is pushed."""

import json
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import evaluate
from evaluate.utils.gradio import parse_readme
from huggingface_hub import CommitOperationAdd, HfApi
from PIL import Image

from ..utils import import_extra
from . import FOLDER, NAMES


if TYPE_CHECKING:
    import gradio


def space_files(name: str, requirement: str = "flow-trl") -> dict[str, bytes]:
    """The files of a metric's Space by their names, for [`push`]; raises a `ValueError` if there is no such metric."""
    if name not in NAMES:
        raise ValueError(f"`names` holds {name!r}, which is no metric. There are {', '.join(map(repr, NAMES))}.")
    files = {path.name: path.read_bytes() for path in (FOLDER / name).iterdir() if path.is_file()}
    lines = files["requirements.txt"].decode().splitlines()
    package, *source = requirement.split(" @ ")
    for index, line in enumerate(lines):
        if line.startswith("flow-trl"):  # whose extras stay
            lines[index] = " @ ".join([line.replace("flow-trl", package), *source])
    return files | {"requirements.txt": "".join(f"{line}\n" for line in lines).encode()}


def push(
    namespace: str, names: list[str] | None = None, *, private: bool = False, requirement: str = "flow-trl"
) -> list[str]:
    """
    Pushes metrics to the Hub, each as a Space that shows it and from which `evaluate.load("namespace/name")` loads it.

    Args:
        namespace (`str`):
            User or organisation.
        names (`list[str]`, *optional*):
            Names of metrics. Defaults to all.
        private (`bool`, *optional*, defaults to `False`):
            Whether new Spaces are private.
        requirement (`str`, *optional*, defaults to `"flow-trl"`):
            What `pip` is to install for flow-trl, such as `"flow-trl @ git+https://..."`.

    Returns:
        `list[str]`: addresses of the Spaces.

    Raises:
        ValueError: if there is no such metric, before anything is pushed, or `namespace` is none.

    Example:

    ```python
    >>> push("user", ["calibration"])
    ['https://huggingface.co/spaces/user/calibration']
    ```
    """
    if not namespace or "/" in namespace:
        raise ValueError(f"`namespace` is {namespace!r}: it must be a user or an organisation of the Hub.")
    spaces = {name: space_files(name, requirement) for name in names or NAMES}
    api, addresses = HfApi(), []
    for name, files in spaces.items():
        repo_id = f"{namespace}/{name}"
        url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        api.create_commit(repo_id, operations, commit_message=f"The metric {name} of flow_trl", repo_type="space")
        addresses.append(str(url))
    return addresses


def app(folder: str | Path) -> "gradio.Interface":
    """
    The app of a metric's Space: arguments of `compute` as JSON (and images), its results, the test cases as examples, the card.

    Args:
        folder (`str` or `Path`):
            Folder of the metric, of any name.

    Returns:
        `gradio.Interface`

    Raises:
        MissingExtraError: if gradio is not installed (extra `spaces`).

    Example:

    ```python
    >>> app("flow_trl/metrics/calibration").launch()
    ```
    """
    gradio = import_extra("gradio", "spaces", "The app of a metric")
    folder = Path(folder)
    (script,) = (path for path in folder.glob("*.py") if path.stem not in ("app", "tests"))
    metric = evaluate.load(str(script), keep_in_memory=True)
    formats = metric.features if isinstance(metric.features, list) else [metric.features]
    has_images = isinstance(formats[-1].get("predictions"), datasets.Image)

    def compute(arguments: str, gallery: list | None = None) -> dict[str, Any]:
        try:
            pictures = {"predictions": [image for image, _ in gallery]} if gallery else {}
            return metric.compute(**json.loads(arguments), **pictures)
        except Exception as error:  # what is wrong with the input is shown where it was made
            raise gradio.Error(f"{type(error).__name__}: {error}") from error

    examples = []
    for case in runpy.run_path(str(folder / "tests.py"))["test_cases"]:
        given = {name: value for name, value in case.items() if name != "result"}
        is_of_images = has_images and isinstance(given["predictions"][0], Image.Image)
        pictures = [(image, None) for image in given.pop("predictions")] if is_of_images else []
        examples.append([json.dumps(given, indent=2), pictures])
    inputs = [gradio.Code(examples[0][0], language="json", label="Arguments of compute()")]
    if has_images:
        inputs.append(
            gradio.Gallery(examples[0][1], type="pil", format="png", label="predictions", file_types=["image"])
        )
    return gradio.Interface(
        compute,
        inputs,
        gradio.JSON(label="Results"),
        title=script.stem,
        description=metric.info.description,
        article=parse_readme(folder / "README.md"),
        examples=[example[: len(inputs)] for example in examples],
        cache_examples=False,
        flagging_mode="never",
        api_name="compute",
    )


def launch(file: str) -> None:
    """Starts the app of the metric beside an `app.py`."""
    app(Path(file).parent).launch()
