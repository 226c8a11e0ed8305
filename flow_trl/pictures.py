"""Pictures of samples: grids with captions, written and read again, and the trackers that are sent them."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from .utils import import_extra


logger = logging.getLogger(__name__)

FRAMES_SHOWN, FRAMES_PER_SECOND = 4, 8  # of a video in a grid, and of an animation


def save_image_grid(
    images: list, columns: int, path: str | Path, captions: list[dict[str, Any]] | None = None
) -> Image.Image:
    """
    Writes images of one size as a PNG grid, filled row by row; missing places stay white. A video is shown as a strip
    of frames, and the grid of moving videos is written beside it as a GIF.

    Args:
        images (`list[PIL.Image.Image]` or `list[list[PIL.Image.Image]]`):
            The images, or videos as lists of frames.
        columns (`int`):
            Number of columns; as many frames of videos.
        path (`str` or `Path`):
            File to write; its folder is made.
        captions (`list[dict]`, *optional*):
            What each image shows, written beside the grid as JSON, from which [`read_grid`] cuts it up again.

    Returns:
        `PIL.Image.Image`: the grid.

    Example:

    ```python
    >>> save_image_grid([Image.new("RGB", (32, 32))] * 7, columns=4, path="grid.png").size
    (128, 64)
    ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(images[0], list):
        frames = [_grid(list(frame), columns) for frame in zip(*images, strict=True)]
        options = {"append_images": frames[1:], "duration": 1000 // FRAMES_PER_SECOND, "loop": 0}
        frames[0].save(path.with_suffix(".gif"), save_all=True, **options)
        images, columns = [_strip(frames) for frames in images], max(1, columns // FRAMES_SHOWN)
    grid = _grid(images, columns)
    grid.save(path)
    if captions is not None:
        text = json.dumps({"columns": columns, "captions": captions})
        path.with_suffix(".json").write_text(text, encoding="utf-8")
    return grid


def _grid(images: list[Image.Image], columns: int) -> Image.Image:
    rows = -(-len(images) // columns)
    blank = Image.new("RGB", images[0].size, "white")
    return make_image_grid(images + [blank] * (rows * columns - len(images)), rows=rows, cols=columns)


def _strip(frames: list[Image.Image]) -> Image.Image:
    """The first, the last and some frames between them, side by side."""
    shown = [frames[i] for i in np.linspace(0, len(frames) - 1, min(FRAMES_SHOWN, len(frames))).round().astype(int)]
    return make_image_grid(shown, rows=1, cols=len(shown))


def saved_grids(output_dir: str | Path, name: str, until: float = math.inf) -> list[Path]:
    """A run's grids whose names begin with `name`, up to an update, in the order of their names."""
    paths = sorted((Path(output_dir) / "images").glob(f"{name}*.png"))
    steps = [path.stem.split("-")[-1] for path in paths]
    return [path for path, step in zip(paths, steps, strict=True) if step.isdigit() and int(step) <= until]


def read_grid(path: str | Path) -> list[tuple[Image.Image, dict[str, Any]]]:
    """
    The images of a grid and their captions.

    Args:
        path (`str` or `Path`):
            A grid of an evaluation in `output_dir/images`.

    Returns:
        `list[tuple[PIL.Image.Image, dict]]`: each image with its `prompt` and `reward`; empty without captions.
    """
    described = Path(path).with_suffix(".json")
    if not described.is_file():
        return []
    saved = json.loads(described.read_text(encoding="utf-8"))
    columns, captions = saved["columns"], saved["captions"]
    with Image.open(path) as grid:
        grid = grid.convert("RGB")
    width, height = grid.width // columns, grid.height // -(-len(captions) // columns)
    cut = []
    for number, caption in enumerate(captions):
        x, y = number % columns * width, number // columns * height
        cut.append((grid.crop((x, y, x + width, y + height)), caption))
    return cut


def caption_text(caption: dict[str, Any]) -> str:
    """A caption in words: `"a red circle (reward 0.512)"`."""
    reward = caption.get("reward")
    return caption["prompt"] if reward is None else f"{caption['prompt']} (reward {reward:.3g})"


def log_image(
    image: Image.Image,
    name: str,
    step: int,
    report_to: list[str],
    callbacks: list[TrainerCallback],
    captions: list[str] | None = None,
    video: str | Path | None = None,
) -> None:
    """
    Sends a picture to the trackers that a trainer reports to, or a video to those that can show one.

    Args:
        image (`PIL.Image.Image`):
            The picture.
        name (`str`):
            Name under which it is logged.
        step (`int`):
            Number of optimizer updates so far.
        report_to (`list[str]`):
            `args.report_to` of the trainer. Trackers that are not known here get no picture, with a warning.
        callbacks (`list[TrainerCallback]`):
            The trainer's callbacks; TensorBoard's holds the writer.
        captions (`list[str]`, *optional*):
            What its images show: the caption of the picture, in TensorBoard and MLflow a text of the same name.
        video (`str` or `Path`, *optional*):
            File of a video, which takes the picture's place except in TensorBoard.
    """
    caption = "\n".join(captions or []) or None
    for tracker in report_to:
        if tracker == "tensorboard":
            writers = [callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback)]
            for writer in filter(None, writers):
                writer.add_image(name, np.asarray(image), step, dataformats="HWC")
                if caption:
                    writer.add_text(f"{name}/captions", caption.replace("\n", "  \n"), step)
                writer.flush()
        elif tracker in ("wandb", "trackio"):
            module = import_extra(tracker, extra="trackers", purpose=f"`report_to={tracker!r}`")
            options = {"caption": caption} if caption else {}
            if video is None:
                shown = module.Image(image, **options)
            else:
                shown = module.Video(str(video), format="gif", **options)
            module.log({name: shown, "train/global_step": step})
        elif tracker == "mlflow":
            module = import_extra(tracker, extra="trackers", purpose=f"`report_to={tracker!r}`")
            key = name.replace("/", "_")
            if video is None:
                module.log_image(image, key=key, step=step)
            else:
                module.log_artifact(str(video), artifact_path="videos")
            if caption:
                module.log_text(caption, f"captions/{key}-{step:06d}.txt")
        else:
            logger.warning("`report_to=%r`: pictures are not sent to this tracker; they are in `output_dir`.", tracker)
