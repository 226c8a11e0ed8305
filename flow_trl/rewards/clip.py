"""Rewards from a CLIP model: agreement of image and prompt, human preference and aesthetics."""

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from .frames import FrameReward
from .pretrained import find_file, load_config, loading, refuse_differences


OPENAI_CLIP = "openai/clip-vit-large-patch14"
# PickScore's own repository has no processor.
PICKSCORE, PICKSCORE_PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
AESTHETIC_HEAD = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


class ClipEncoder:
    """
    Embeds images with a frozen CLIP (https://huggingface.co/papers/2103.00020).

    Called with tensors, it prepares them on the model's device as the processor would. Rewards embed PIL images by the
    processor itself, so the two differ a little where images are resized.

    Args:
        model (`str`, `Path` or `transformers.CLIPModel`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of a CLIP, which is loaded in float32, or the model itself, which is put in evaluation
            mode and gets no gradients from then on.
        processor (`str`, `Path` or [`~transformers.CLIPProcessor`], *optional*):
            Hub id or folder of the model's processor, or the processor itself. Defaults to the one beside the model.
        device (`str` or `torch.device`, *optional*):
            Where the model is moved to. Defaults to where a given model is, for a loaded one to this process's GPU if
            there is one, else the CPU.
        batch_size (`int`, *optional*, defaults to `64`):
            Images per forward pass.

    Attributes:
        model ([`~transformers.CLIPModel`]): the model.
        processor ([`~transformers.CLIPProcessor`]): its processor.
        image_size (`int`): height and width in pixels of the model's input.
        dim (`int`): how many numbers an embedding has.
        batch_size (`int`): images per forward pass.

    Raises:
        ValueError: if no CLIP or processor can be loaded, the two do not fit, or `batch_size` is below 1.
        TypeError: if `model` or `processor` is of another type.

    Example:

    ```python
    >>> import torch
    >>> from flow_trl.rewards.clip import ClipEncoder

    >>> encoder = ClipEncoder("openai/clip-vit-base-patch32")
    >>> encoder(torch.rand(2, 3, 512, 512)).shape
    torch.Size([2, 512])
    ```
    """

    def __init__(
        self,
        model: str | Path | CLIPModel = OPENAI_CLIP,
        processor: str | Path | CLIPProcessor | None = None,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 64,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}: it must be 1 or more.")
        if not isinstance(model, CLIPModel):
            model = _load_model(model)
            device = device or PartialState().device
        self.model = model.to(device).eval().requires_grad_(False)
        self.processor = _load_processor(processor, model)
        self.image_size: int = model.config.vision_config.image_size
        self.dim: int = model.config.projection_dim
        self.batch_size = batch_size
        probe = self.processor(images=Image.new("RGB", (self.image_size,) * 2), return_tensors="pt").pixel_values
        if probe.shape[-2:] != (self.image_size,) * 2:
            raise ValueError(
                f"`processor` makes images of {probe.shape[-2]} x {probe.shape[-1]} pixels, but `model` takes "
                f"{self.image_size} x {self.image_size}. Pass the processor that belongs to the model."
            )

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """
        Embeds images, after CLIP's own preprocessing: the shorter edge is resized to `image_size` (bicubic), the
        middle is cut out, and the colours are normalised.

        Args:
            pixels (`torch.Tensor` of shape `(B, 3, H, W)`):
                Images in [0, 1], of any floating-point type and on any device; values beyond are clamped.

        Returns:
            `torch.Tensor` of shape `(B, dim)`: embeddings in float32, not normalised, on the model's device.

        Raises:
            ValueError: if `pixels` has another shape or holds integers.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise ValueError(
                f"`pixels` has the shape {tuple(pixels.shape)} and the type {pixels.dtype}: it must be (B, 3, H, W) "
                "and floating-point in [0, 1] (divide integers by 255)."
            )
        return torch.cat([self._embed(self._preprocess(chunk)) for chunk in pixels.split(self.batch_size)])

    def _preprocess(self, pixels: torch.Tensor) -> torch.Tensor:
        size = self.image_size
        pixels = pixels.to(self.model.device, torch.float32)
        short = min(pixels.shape[-2:])
        if short != size:
            resized = [int(size * edge / short) for edge in pixels.shape[-2:]]
            pixels = F.interpolate(pixels, size=resized, mode="bicubic", antialias=True)
        top, left = ((edge - size) // 2 for edge in pixels.shape[-2:])
        pixels = pixels[..., top : top + size, left : left + size].clamp(0, 1)
        image_processor = self.processor.image_processor
        mean, std = (
            pixels.new_tensor(moment).view(3, 1, 1)
            for moment in (image_processor.image_mean, image_processor.image_std)
        )
        return (pixels - mean) / std

    def embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        """Embeddings of PIL images of any size and mode, prepared by the processor: `(B, dim)`, float32."""
        images = [image.convert("RGB") for image in images]
        return self._embed(self.processor(images=images, return_tensors="pt").pixel_values)

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Embeddings of texts, cut off where the model's context ends: `(B, dim)`, float32."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(
            texts, padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self.model.device)
        return self.model.get_text_features(**tokens).pooler_output.float()

    def _embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        return self.model.get_image_features(pixel_values).pooler_output.float()


class _ClipReward(FrameReward):
    def __init__(
        self,
        model: str | Path | CLIPModel = OPENAI_CLIP,
        processor: str | Path | CLIPProcessor | None = None,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        num_frames: int = 8,
    ):
        super().__init__(batch_size, num_frames)
        self.encoder = ClipEncoder(model, processor, device=device, batch_size=batch_size)

    def _cosine(self, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        return F.cosine_similarity(self.encoder.embed_images(images), self.encoder.embed_texts(prompts))


class ClipScore(_ClipReward):
    """
    Rewards images that fit their prompt: `100 * max(cos(image, text), 0)`, between 0 and 100.

    This is CLIPScore (https://huggingface.co/papers/2104.08718) with a weight of 100, as in torchmetrics, in place of
    the paper's 2.5, and without the words "A photo depicts" that the paper puts before a caption. The default model
    takes 1.7 GB, and about 2 seconds per image on one CPU core; it is meant for a GPU.

    Args:
        model (`str`, `Path` or `transformers.CLIPModel`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of a CLIP, or the model itself, see [`ClipEncoder`].
        processor (`str`, `Path` or [`~transformers.CLIPProcessor`], *optional*):
            Hub id or folder of the model's processor, or the processor itself. Defaults to the one beside the model.
        device (`str` or `torch.device`, *optional*):
            Where the model is moved to, see [`ClipEncoder`].
        batch_size (`int`, *optional*, defaults to `64`):
            Images per forward pass.
        num_frames (`int`, *optional*, defaults to `8`):
            Frames of a video, at even distances, whose mean is its score; all frames where there are fewer.

    Attributes:
        encoder ([`ClipEncoder`]): what embeds the images; it has the model and its processor.

    Raises:
        ValueError: if no CLIP or processor can be loaded, the two do not fit, or `batch_size` or `num_frames` is below
            1.
        TypeError: if `model` or `processor` is of another type.

    Example:

    ```python
    >>> from PIL import Image
    >>> from flow_trl.rewards.clip import AestheticScore, ClipScore

    >>> clip_score = ClipScore()
    >>> scores = clip_score(prompts=["a red square"], images=[Image.new("RGB", (512, 512), "red")])
    >>> # the same CLIP serves a second reward
    >>> aesthetic = AestheticScore(clip_score.encoder.model, clip_score.encoder.processor)
    ```
    """

    __name__ = "clip_score"

    def _score(self, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        return 100 * self._cosine(prompts, images).clamp(min=0)


class PickScore(_ClipReward):
    """
    Rewards images that people would prefer for their prompt, with a CLIP trained on such choices (Pick-a-Pic,
    https://huggingface.co/papers/2305.01569): `logit_scale.exp() * cos(image, text)`.

    The factor is the model's, about 100, so that most scores lie around 20; the difference of two images' scores is
    the log-odds of the one being preferred. The default model takes 3.9 GB, and about 4 seconds per image on one CPU
    core; it is meant for a GPU. Arguments, attributes and errors are those of [`ClipScore`], but for two defaults.

    Args:
        model (`str`, `Path` or `transformers.CLIPModel`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`):
            Hub id or folder of a CLIP, or the model itself.
        processor (`str`, `Path` or [`~transformers.CLIPProcessor`], *optional*):
            Hub id or folder of the model's processor, or the processor itself. Defaults to the one in the model's
            folder, and where there is none to that of `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`, on which PickScore is
            based.

    Example:

    ```python
    >>> from PIL import Image
    >>> from flow_trl.rewards.clip import PickScore

    >>> pickscore = PickScore()
    >>> scores = pickscore(prompts=["a red square"], images=[Image.new("RGB", (512, 512), "red")])
    ```
    """

    __name__ = "pickscore"

    def __init__(
        self,
        model: str | Path | CLIPModel = PICKSCORE,
        processor: str | Path | CLIPProcessor | None = None,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        num_frames: int = 8,
    ):
        if processor is None:
            folder = Path(model.name_or_path if isinstance(model, CLIPModel) else str(model))
            if not any((folder / name).is_file() for name in PROCESSOR_FILES):
                processor = PICKSCORE_PROCESSOR
        super().__init__(model, processor, device=device, batch_size=batch_size, num_frames=num_frames)

    def _score(self, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        return self.encoder.model.logit_scale.exp() * self._cosine(prompts, images)


class AestheticScore(_ClipReward):
    """
    Rewards images that people find beautiful, whatever the prompt, on a scale on which most lie between 4 and 7.

    This is [LAION's aesthetic predictor](https://github.com/christophschuhmann/improved-aesthetic-predictor), a reward
    of [DDPO](https://huggingface.co/papers/2305.13301): a network without nonlinearities on CLIP's image embedding,
    scaled to length 1. Memory and time are those of [`ClipScore`], and so is all that is not listed.

    Args:
        model (`str`, `Path` or `transformers.CLIPModel`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of the CLIP that the head was trained on, or the model itself.
        head (`str` or `Path`, *optional*, defaults to `"trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"`):
            Weights of the network: a file, or `"owner/repository/file"` on the Hub; `.safetensors`, or else what
            `torch.save` writes.

    Attributes:
        head (`torch.nn.Sequential`): the network, from `encoder.dim` numbers to one.

    Raises:
        ValueError: as of [`ClipScore`], or if no head can be loaded or it does not fit the CLIP.

    Example:

    ```python
    >>> from PIL import Image
    >>> from flow_trl.rewards.clip import AestheticScore

    >>> aesthetic = AestheticScore()
    >>> scores = aesthetic(prompts=[""], images=[Image.new("RGB", (512, 512), "red")])
    ```
    """

    __name__ = "aesthetic"

    def __init__(
        self,
        model: str | Path | CLIPModel = OPENAI_CLIP,
        processor: str | Path | CLIPProcessor | None = None,
        *,
        head: str | Path = AESTHETIC_HEAD,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        num_frames: int = 8,
    ):
        super().__init__(model, processor, device=device, batch_size=batch_size, num_frames=num_frames)
        self.head = _load_head(head, self.encoder.dim).to(self.encoder.model.device)

    def _score(self, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        return self.head(F.normalize(self.encoder.embed_images(images))).squeeze(-1)


def _load_model(model: str | Path) -> CLIPModel:
    if not isinstance(model, (str, Path)):
        raise TypeError(
            f"`model` must be the Hub id or folder of a CLIP, or a `transformers.CLIPModel`, but it is a "
            f"{type(model).__name__}."
        )
    others = "a folder that `CLIPModel.save_pretrained` has written, or a `transformers.CLIPModel`"
    with loading(model, "CLIP", OPENAI_CLIP, others):
        return CLIPModel.from_pretrained(model, config=load_config(model, CLIPConfig), dtype=torch.float32)


def _load_processor(processor: str | Path | CLIPProcessor | None, model: CLIPModel) -> CLIPProcessor:
    if isinstance(processor, CLIPProcessor):
        return processor
    if not isinstance(processor, (str, Path, type(None))):
        raise TypeError(
            f"`processor` must be the Hub id or folder of a CLIP's processor, or a `transformers.CLIPProcessor`, but "
            f"it is a {type(processor).__name__}."
        )
    name = processor or model.name_or_path
    remedy = "Pass the model's `transformers.CLIPProcessor`, or the Hub id or folder of a CLIP that has one."
    if not name:
        raise ValueError(f"`processor` is None, and `model` comes from no folder that could have one. {remedy}")
    try:
        return CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f'`processor` is {processor and repr(str(processor))}, and none can be loaded from "{name}" ({error}). '
            f"{remedy}"
        ) from error


def _load_head(head: str | Path, dim: int) -> nn.Sequential:
    path = find_file(head, "head", AESTHETIC_HEAD)
    weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    layers = nn.Sequential(
        nn.Linear(dim, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    refuse_differences(
        {f"layers.{name}": weight for name, weight in layers.state_dict().items()},
        weights,
        f'`head` is "{head}", which does not fit LAION\'s aesthetic predictor on embeddings of {dim} numbers, those of '
        f'`model`. Pass the `model` that the head was trained on (for the default head "{OPENAI_CLIP}"), or a head that '
        "was trained on this one",
    )
    layers.load_state_dict({name.removeprefix("layers."): weight for name, weight in weights.items()})
    return layers.float().eval().requires_grad_(False)
