"""The size of an image as JPEG, a reward that needs no model (DDPO, https://huggingface.co/papers/2305.13301)."""

from io import BytesIO
from typing import Any

from PIL import Image

from . import refuse_videos


def jpeg_compressibility(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float]:
    """
    Rewards images that compress well: minus the size as JPEG of quality 95, in kilobytes of 1000 bytes.

    Called as [`flow_trl.rewards`] says, with images of any size and mode; only `images` is used.

    Returns:
        `list[float]`: one reward per image, below 0. Images of equal size only should be compared.

    Raises:
        ValueError: if an image is a video.

    Example:

    ```python
    >>> from PIL import Image
    >>> from flow_trl.rewards.jpeg import jpeg_compressibility

    >>> jpeg_compressibility(prompts=["nothing"], images=[Image.new("RGB", (32, 32))])
    [-0.643]
    ```
    """
    refuse_videos("jpeg_compressibility", images)
    return [-_kilobytes(image) for image in images]


def jpeg_incompressibility(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float]:
    """
    Rewards images that are rich in detail: the negative of [`~rewards.jpeg.jpeg_compressibility`].

    Example:

    ```python
    >>> from PIL import Image
    >>> from flow_trl.rewards.jpeg import jpeg_incompressibility

    >>> jpeg_incompressibility(prompts=["nothing"], images=[Image.new("RGB", (32, 32))])
    [0.643]
    ```
    """
    refuse_videos("jpeg_incompressibility", images)
    return [_kilobytes(image) for image in images]


jpeg_compressibility.takes_videos = jpeg_incompressibility.takes_videos = False


def _kilobytes(image: Image.Image) -> float:
    buffer = BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000
