"""Human Preference Score v2, an OpenCLIP checkpoint, as a CLIP of transformers."""

import re
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from .clip import PICKSCORE_PROCESSOR, _ClipReward
from .pretrained import find_file, load_config, loading, refuse_differences


HPSV2 = "xswu/HPSv2/HPS_v2.1_compressed.pt"
OPEN_CLIP = PICKSCORE_PROCESSOR  # the ViT-H/14 of which it is a fine-tuning
# Names of OpenCLIP's weights, and what transformers calls them.
_NAMES = {
    r"^visual\.(class_embedding)$": r"vision_model.embeddings.\1",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^visual\.proj$": "visual_projection.weight",
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"^text_projection$": "text_projection.weight",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.attn\.in_proj_": ".self_attn.in_proj.",
    r"\.attn\.out_proj\.": ".self_attn.out_proj.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
}


class HPSv2(_ClipReward):
    """
    Rewards images that people would prefer for their prompt: Human Preference Score v2.1
    (https://huggingface.co/papers/2306.09341), the cosine of image and prompt in a CLIP trained on such choices.

    Most scores lie between 0.2 and 0.35. Images are not cropped but get black bars where they are not square, as in the
    authors' package `hpsv2`. Memory and time are those of [`~rewards.clip.PickScore`], and what is not listed that of
    [`~rewards.clip.ClipScore`].

    Args:
        checkpoint (`str` or `Path`, *optional*, defaults to `"xswu/HPSv2/HPS_v2.1_compressed.pt"`):
            OpenCLIP weights as the authors save them: a file, or `"owner/repository/file"` on the Hub.
        model (`str` or `Path`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Hub id or folder of a CLIP of the checkpoint's architecture, of which only configuration and processor are used.

    Raises:
        ValueError: if the checkpoint, configuration or processor cannot be loaded or do not fit one another, or `batch_size`
            or `num_frames` is below 1.

    Example:

    ```python
    >>> from PIL import Image
    >>> from flow_trl.rewards.hps import HPSv2

    >>> hpsv2 = HPSv2()
    >>> scores = hpsv2(prompts=["a red square"], images=[Image.new("RGB", (512, 512), "red")])
    ```
    """

    __name__ = "hpsv2"

    def __init__(
        self,
        checkpoint: str | Path = HPSV2,
        model: str | Path = OPEN_CLIP,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        num_frames: int = 8,
    ):
        path = find_file(checkpoint, "checkpoint", HPSV2)
        device = device or PartialState().device
        clip = _load_open_clip(path, model)
        super().__init__(clip, model, device=device, batch_size=batch_size, num_frames=num_frames)

    def _score(self, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        return self._cosine(prompts, [_squared(image, self.encoder.image_size) for image in images])


def _load_open_clip(path: Path, model: str | Path) -> CLIPModel:
    """A CLIP of this architecture with the weights that `torch.save` wrote, alone or as `"state_dict"`."""
    with loading(model, "configuration of a CLIP", OPEN_CLIP, "on which the checkpoint is based, or a folder"):
        config = load_config(model, CLIPConfig)
    weights = torch.load(path, "cpu", weights_only=True)
    renamed = {}
    for name, weight in weights.get("state_dict", weights).items():
        for pattern, replacement in _NAMES.items():
            name = re.sub(pattern, replacement, name)
        if ".in_proj." in name:
            for part, third in zip("qkv", weight.chunk(3), strict=True):
                renamed[name.replace("in_proj", f"{part}_proj")] = third
        else:
            renamed[name] = weight.T if name.endswith("projection.weight") else weight
    with torch.device("meta"):
        expected = CLIPModel(config).state_dict()
    refuse_differences(
        expected, renamed, f'`checkpoint` is "{path}", which does not fit the architecture of "{model}"'
    )
    return CLIPModel.from_pretrained(None, config=config, state_dict=renamed, dtype=torch.float32)


def _squared(image: Image.Image, side: int) -> Image.Image:
    """An image with its longer edge resized to `side`, in the middle of a black square."""
    image = image.resize([round(edge * side / max(image.size)) for edge in image.size], Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
