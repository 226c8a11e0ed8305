"""What rewards share that score image by image with a model: batches, and the frames of videos."""

from itertools import islice
from typing import Any

import torch
from PIL import Image


class FrameReward:
    """
    A reward whose `_score(prompts, images)` takes at most `batch_size` images; of a video it gets `num_frames` frames.

    Args:
        batch_size (`int`):
            Images per forward pass.
        num_frames (`int`):
            Frames of a video, at even distances, whose mean is its score; all frames where there are fewer.

    Raises:
        ValueError: if one of the two is below 1.

    Example:

    ```python
    >>> class Redness(FrameReward):
    ...     __name__ = "redness"
    ...
    ...     def _score(self, prompts, images):
    ...         return torch.stack([to_tensor(image)[0].mean() for image in images])
    ```
    """

    __name__: str
    takes_videos = True

    def __init__(self, batch_size: int, num_frames: int):
        for name, value in {"batch_size": batch_size, "num_frames": num_frames}.items():
            if value < 1:
                raise ValueError(f"`{name}` is {value}: it must be 1 or more.")
        self.batch_size, self.num_frames = batch_size, num_frames

    @torch.no_grad()
    def __call__(
        self, prompts: list[str], images: list[Image.Image] | list[list[Image.Image]], **columns: Any
    ) -> list[float]:
        """
        Scores images or videos, of any size and mode, see [`flow_trl.rewards`].

        Returns:
            `list[float]`: one score per image; for a video the mean of `num_frames` frames.

        Raises:
            ValueError: if there are not as many prompts as images.
        """
        if len(prompts) != len(images):
            raise ValueError(
                f"The reward `{self.__name__}` got {len(prompts)} `prompts` and {len(images)} `images`: pass one "
                "prompt per image."
            )
        videos = [self._pick(image) if isinstance(image, list) else [image] for image in images]
        frames = [frame for video in videos for frame in video]
        prompts = [prompt for prompt, video in zip(prompts, videos, strict=True) for _ in video]
        scores = []
        for start in range(0, len(frames), self.batch_size):
            part = slice(start, start + self.batch_size)
            scores += self._score(prompts[part], [frame.convert("RGB") for frame in frames[part]]).tolist()
        of_frames = iter(scores)
        return [sum(islice(of_frames, len(video))) / len(video) for video in videos]

    def _pick(self, video: list[Image.Image]) -> list[Image.Image]:
        """The middle frame of each of `num_frames` equal parts, or all frames if there are fewer."""
        count = min(self.num_frames, len(video))
        return [video[(2 * i + 1) * len(video) // (2 * count)] for i in range(count)]

    def _score(self, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        raise NotImplementedError
