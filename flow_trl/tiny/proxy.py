"""
Over-optimisation made small: an exact reward of the image alone, and a reward that is learnt from few noisy labels of it.
What such a proxy leads to is studied in [2210.10760](https://huggingface.co/papers/2210.10760).
"""

import numpy as np
import torch
from PIL import Image

from ..rewards.clip import ClipEncoder
from . import load_clip, load_diffusion_pipeline, load_prompts


COVERED, DARK = 0.2, 140  # half way between the background and any colour, in its smallest channel
NUM_LABELS, NUM_UNLABELLED = 96, 160  # images; those without labels scale the proxy


def gold(prompts: list[str], images: list[Image.Image], **columns) -> list[float]:
    """
    Minus the difference between the share of each image that shapes cover and one fifth, in percentage points.

    Args:
        prompts (`list[str]`):
            Not looked at.
        images (`list[PIL.Image.Image]`):
            The images.

    Returns:
        `list[float]`: at most 0, which is best.

    Example:

    ```python
    >>> gold(prompts=[""], images=[Image.new("RGB", (32, 32), "white")])
    [-20.0]
    ```
    """
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    covered = (pixels.min(-1) < DARK).mean((1, 2))
    return (-100 * abs(covered - COVERED)).tolist()


class Proxy:
    """
    A ridge regression of noisy labels on the tiny CLIP's embedding of an image, in standard deviations over images of the
    pretrained diffusion model. The labels are [`gold`] of some of these images, plus as much noise as gold varies. Most of
    them are covered by less than a fifth, so what the head can learn is that more is better: as it is climbed, gold rises,
    and then falls.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Draws the images and the noise of their labels.
        num_inference_steps (`int`, *optional*, defaults to `5`):
            Denoising steps of the images.

    Attributes:
        encoder ([`~rewards.clip.ClipEncoder`]): the tiny CLIP's image encoder.
        correlation (`float`): with gold, on images that were not labelled.

    Example:

    ```python
    >>> proxy = Proxy(seed=42)
    >>> scores = proxy(prompts=[""], images=[Image.new("RGB", (32, 32), "white")])
    ```
    """

    __name__ = "proxy"

    def __init__(self, seed: int = 0, num_inference_steps: int = 5):
        self.encoder = ClipEncoder(*load_clip())
        prompts = load_prompts("scenes", "train").shuffle(seed=seed)["prompt"][: NUM_LABELS + NUM_UNLABELLED]
        pipe = load_diffusion_pipeline()
        pipe.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": num_inference_steps, "guidance_scale": 1.0, "eta": 1.0}
        images = pipe(prompts, **settings, generator=torch.Generator().manual_seed(seed)).images
        features, exact = self._embed(images), np.array(gold(prompts, images))
        labels, rest = slice(NUM_LABELS), slice(NUM_LABELS, None)
        noise = np.random.default_rng(seed).normal(0, exact[labels].std(), NUM_LABELS)
        self.weights = _ridge(features[labels], exact[labels] + noise)
        predicted = features[rest] @ self.weights
        self.mean, self.std = predicted.mean(), predicted.std()
        self.correlation = float(np.corrcoef(predicted, exact[rest])[0, 1])

    def _embed(self, images: list[Image.Image]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        embeddings = self.encoder(pixels.permute(0, 3, 1, 2) / 255)
        return torch.nn.functional.normalize(embeddings).double().numpy()

    def __call__(self, prompts: list[str], images: list[Image.Image], **columns) -> list[float]:
        return ((self._embed(images) @ self.weights - self.mean) / self.std).tolist()


def _ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights (d,) of a ridge regression of y (N,) on x (N, d); the strength is the best when one label is left out."""
    x, y = x - x.mean(0), y - y.mean()
    found = {}
    for strength in 10.0 ** np.arange(-3, 2):
        solve = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T)
        hat = np.diag(x @ solve) + 1 / len(x)
        error = np.mean(((y - x @ solve @ y) / (1 - hat)) ** 2)
        found[error] = solve @ y
    return found[min(found)]
