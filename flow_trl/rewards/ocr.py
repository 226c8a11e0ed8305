"""Reward for legible text: what a real OCR engine reads in the image against what was asked for."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..utils import import_extra
from . import refuse_videos


# Up to this size an image is taken as one word and read without looking for text boxes first.
SMALL_SIDE = 64
# Images per task of a worker, and the largest number of workers; each has an engine of its own.
BATCH_SIZE, MAX_WORKERS = 12, 8
# The recogniser's input (width, height) for a small image: twice as wide as high, so that narrow letters stay apart.
SMALL_INPUT = (96, 48)
PURPOSE = "The OCR reward (Python 3.12 at most)"


def ocr_score(reading: str, target: str, *, contained: bool = False) -> float:
    """
    How well a reading agrees with the text that was asked for: `1 - min(d, n) / n`, where `d` is the edit distance
    (Levenshtein) between the two and `n` the target's length, both without spaces and in lower case.

    Args:
        reading (`str`):
            The text that was read.
        target (`str`):
            The text that was asked for.
        contained (`bool`, *optional*, defaults to `False`):
            Whether a reading that contains the target scores 1, whatever stands beside it. This is the rule of
            [Flow-GRPO](https://huggingface.co/papers/2505.05470)'s code.

    Returns:
        `float`: the score in [0, 1].

    Raises:
        ValueError: if `target` is blank.
        MissingExtraError: if the packages of the extra `ocr` are not installed.

    Example:

    ```python
    >>> from flow_trl.rewards.ocr import ocr_score

    >>> ocr_score("Cats", "cat"), ocr_score("Cats", "cat", contained=True)
    (0.6666666666666667, 1.0)
    ```
    """
    distance = import_extra("rapidfuzz.distance", extra="ocr", purpose=PURPOSE).Levenshtein.distance
    reading, wanted = _normalise(reading), _normalise(target)
    if not wanted:
        raise ValueError(f"`target` is {target!r}: it must have at least one character that is no space.")
    if contained and wanted in reading:
        return 1.0
    return 1 - min(distance(reading, wanted) / len(wanted), 1)


class OCRReward:
    """
    Rewards images that show the text that was asked for, read by PP-OCR (`rapidocr-onnxruntime`, models included).

    The score is that of [`ocr_score`]: 1 for a perfect reading, 0 where nothing of it can be read. By default text beside
    the target costs; the reward `"ocr_flow_grpo"` forgives it, as [Flow-GRPO](https://huggingface.co/papers/2505.05470)
    does.

    Images whose longer side is at most 64 pixels are read as one word, in batches (about 6 ms each on one CPU core).
    In larger ones text is looked for first, and all that is found is joined from top to bottom (about 60 ms at
    256 x 256 and 110 ms at 512 x 512). Images are read in parallel, by as many threads as torch has
    (`torch.get_num_threads()`) when the reward is constructed, at most 8.

    Args:
        contained (`bool`, *optional*, defaults to `False`):
            Whether a reading that contains the target scores 1, Flow-GRPO's rule.

    Raises:
        MissingExtraError: if the packages of the extra `ocr` are not installed.

    Example:

    ```python
    >>> from PIL import Image, ImageDraw
    >>> from flow_trl.rewards.ocr import OCRReward

    >>> image = Image.new("RGB", (32, 32), "white")
    >>> ImageDraw.Draw(image).text((4, 10), "CAT", fill="black")
    >>> reward_func = OCRReward()
    >>> reward_func(prompts=['the word "CAT"', 'the word "CAR"', "a cat"], images=[image] * 3)
    [1.0, 0.6666666666666667, None]
    ```
    """

    takes_videos = False

    def __init__(self, contained: bool = False):
        self.contained = contained
        self.__name__ = "ocr_flow_grpo" if contained else "ocr"
        engine = import_extra("rapidocr_onnxruntime", extra="ocr", purpose=PURPOSE)
        ocr_score("", "a")  # raises now if its package is missing
        self._local = threading.local()

        def start():
            self._local.engine = engine.RapidOCR(
                intra_op_num_threads=1,
                inter_op_num_threads=1,
                # The defaults pad every word to 320 x 48 and enlarge every image to 736 pixels: three times slower.
                rec_img_shape=[3, SMALL_INPUT[1], SMALL_INPUT[0]],
                det_limit_side_len=320,
            )

        self._workers = ThreadPoolExecutor(min(torch.get_num_threads(), MAX_WORKERS), initializer=start)

    def __call__(
        self, prompts: list[str], images: list[Image.Image], text: list[str | None] | None = None, **columns: Any
    ) -> list[float | None]:
        """
        Scores images of any size and mode, see [`flow_trl.rewards`].

        The target is what stands first in double quotes in the prompt, where the column `text` gives none.

        Returns:
            `list[float | None]`: one score in [0, 1] per image, `None` where there is no target.

        Raises:
            ValueError: if an image is a video.
        """
        refuse_videos(self.__name__, images)
        targets = [
            _quoted(prompt) if target is None else target
            for prompt, target in zip(prompts, text or [None] * len(prompts), strict=True)
        ]
        scores: list[float | None] = [None] * len(images)
        asked = [i for i, target in enumerate(targets) if _normalise(target)]
        for i, reading in zip(asked, self.read([images[i] for i in asked]), strict=True):
            scores[i] = ocr_score(reading, targets[i], contained=self.contained)
        return scores

    def read(self, images: list[Image.Image]) -> list[str]:
        """Reads the text in each of some images, of any size and mode; `""` where there is none."""
        small = [i for i, image in enumerate(images) if max(image.size) <= SMALL_SIDE]
        tasks = [small[start : start + BATCH_SIZE] for start in range(0, len(small), BATCH_SIZE)]
        tasks += [[i] for i in range(len(images)) if max(images[i].size) > SMALL_SIDE]
        texts = self._workers.map(lambda task: self._read_batch([images[i] for i in task]), tasks)
        readings = {
            i: text for task, batch in zip(tasks, texts, strict=True) for i, text in zip(task, batch, strict=True)
        }
        return [readings[i] for i in range(len(images))]

    def _read_batch(self, images: list[Image.Image]) -> list[str]:
        engine = self._local.engine
        if max(images[0].size) > SMALL_SIDE:
            found, _ = engine(_to_bgr(images[0].convert("RGB")), use_cls=False)
            return ["".join(reading for _, reading, _ in found or [])]
        inputs = [_to_bgr(image.convert("RGB").resize(SMALL_INPUT, Image.Resampling.BICUBIC)) for image in images]
        recognised, _ = engine.text_rec(inputs)
        return [reading for reading, _ in recognised]


def _to_bgr(image: Image.Image) -> np.ndarray:
    return np.asarray(image)[:, :, ::-1]


def _quoted(prompt: str) -> str:
    match = re.search(r'["“](.+?)["”]', prompt)
    return match[1] if match else ""


def _normalise(text: str) -> str:
    return "".join(text.split()).lower()
