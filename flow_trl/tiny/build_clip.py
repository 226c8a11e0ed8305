"""
Builds the tiny world's `CLIPModel` from nothing and prints its figures.

```sh
python -m flow_trl.tiny.build_clip --output_dir clip
python -m flow_trl.tiny.build_clip --evaluate_only clip
```

It takes about half an hour on one CPU core; a GPU is used where there is one.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm, trange
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, HfArgumentParser

from . import CLIP_FOLDER, load_clip, load_prompts
from .building import NUM_TOKENS, CommonArguments, make_tokenizer, print_figures, to_tensor
from .scenes import render_scene


@dataclass
class BuildArguments(CommonArguments):
    """Arguments of this script."""

    output_dir: str = field(default=str(CLIP_FOLDER), metadata={"help": "Where to write the model."})
    images_per_prompt: int = field(default=24, metadata={"help": "Training pictures of each prompt."})
    steps: int = field(default=3000, metadata={"help": "Steps of 256 pairs."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Highest learning rate of AdamW."})


def make_clip() -> tuple[CLIPModel, CLIPProcessor]:
    """An untrained CLIP with embeddings of 64 numbers, for pictures and prompts of the tiny world, and its processor."""
    tokenizer = make_tokenizer()
    layers = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2}
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        text_config={"vocab_size": len(tokenizer), "max_position_embeddings": NUM_TOKENS, **tokens, **layers},
        vision_config={"image_size": 32, "patch_size": 4, **layers},
        projection_dim=64,
    )
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **half)
    return CLIPModel(config), CLIPProcessor(image_processor, tokenizer)


def train_clip(model: CLIPModel, tokens: torch.Tensor, images: torch.Tensor, steps: int, learning_rate: float) -> None:
    """
    Trains a CLIP in place, by its contrastive loss (https://huggingface.co/papers/2103.00020) on batches of 256 distinct
    prompts: tokens `(P, 14)` with pictures `(P, I, 3, 32, 32)` in [-1, 1], which are shown with a little noise.
    """
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    progress = trange(steps, desc="CLIP")
    for step in progress:
        rows = torch.randperm(len(tokens))[:256]
        pixels = images[rows, torch.randint(images.shape[1], (len(rows),))].to(model.device)
        pixels = pixels + 0.1 * torch.rand(len(rows), 1, 1, 1, device=model.device) * torch.randn_like(pixels)
        logits = model(input_ids=tokens[rows].to(model.device), pixel_values=pixels).logits_per_image
        target = torch.arange(len(rows), device=model.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=loss.item())
    model.eval()


@torch.no_grad()
def evaluate(model: CLIPModel, processor: CLIPProcessor) -> dict[str, float]:
    """
    Retrieval on 16 times 64 test prompts with a new picture each: how often the right prompt fits a picture best, and how
    often the right picture a prompt.
    """
    rows = load_prompts("scenes", "test").select(range(1024)).to_dict()
    images = [render_scene(include, seed=10**7 + i) for i, include in enumerate(rows["include"])]
    inputs = processor(text=rows["prompt"], images=images, padding=True, return_tensors="pt").to(model.device)
    output = model(**inputs)
    shares = {}
    for name, left, right in (
        ("prompt", output.image_embeds, output.text_embeds),
        ("picture", output.text_embeds, output.image_embeds),
    ):
        scores = left.view(16, 64, -1) @ right.view(16, 64, -1).mT
        is_right = scores.argmax(-1) == torch.arange(64, device=scores.device)
        shares[f"right {name} among 64"] = is_right.float().mean().item()
    return shares


def main(args: BuildArguments) -> None:
    """Builds a model, unless there is one to evaluate, and prints a table of its figures."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = args.evaluate_only or args.output_dir
    if args.evaluate_only is None:
        torch.manual_seed(args.seed)
        model, processor = make_clip()
        rows, seeds = load_prompts("scenes", "train").to_dict(), np.random.default_rng(args.seed)
        seeds = seeds.integers(10**6, size=(len(rows["prompt"]), args.images_per_prompt)).tolist()
        images = torch.stack(
            [
                to_tensor([render_scene(include, seed) for seed in own])
                for include, own in zip(tqdm(rows["include"], desc="pictures"), seeds, strict=True)
            ]
        )
        tokens = processor.tokenizer(
            rows["prompt"], padding="max_length", max_length=NUM_TOKENS, return_tensors="pt"
        ).input_ids
        train_clip(model.to(device), tokens, images, args.steps, args.learning_rate)
        model.half().save_pretrained(folder)
        processor.save_pretrained(folder)
    model, processor = load_clip(folder)
    figures = evaluate(model.to(device), processor)
    print_figures(figures | {"parameters": model.num_parameters()}, folder)


if __name__ == "__main__":
    main(HfArgumentParser(BuildArguments).parse_args_into_dataclasses()[0])
