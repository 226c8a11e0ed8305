"""
A world small enough to train in on two CPU cores: tasks with prompts and pictures, and shipped models that load with
the classes that real ones have.
"""

from pathlib import Path
from typing import Any

from .scenes import load_prompts


__all__ = ["load_flow_pipeline", "load_prompts"]

FLOW_FOLDER = Path(__file__).parent / "flow"


def load_flow_pipeline(folder: str | Path = FLOW_FOLDER, **kwargs: Any):
    """
    Loads the tiny world's flow-matching model, in float32.

    It draws 32 x 32 pictures for the prompts of [`load_prompts`]. It has no T5 encoder, for which the pipeline would
    put in 256 empty tokens: pass `max_sequence_length=0` to leave them out, as in training.

    Args:
        folder (`str` or `Path`, *optional*):
            Another pipeline's folder, such as one that `python -m flow_trl.tiny.build_flow` has written.
        kwargs:
            Go to [`~diffusers.DiffusionPipeline.from_pretrained`]; `dtype` defaults to `torch.float32`.

    Returns:
        [`~diffusers.StableDiffusion3Pipeline`]: on the CPU.

    Example:

    ```python
    >>> pipe = load_flow_pipeline()
    >>> prompt = "a photo of a red circle left of a blue square"
    >>> image = pipe(prompt, num_inference_steps=10, guidance_scale=2.0, max_sequence_length=0).images[0]
    ```
    """
    import torch
    from diffusers import StableDiffusion3Pipeline

    kwargs = {"dtype": torch.float32, "text_encoder_3": None, "tokenizer_3": None, **kwargs}
    return StableDiffusion3Pipeline.from_pretrained(folder, **kwargs)
