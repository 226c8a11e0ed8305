# The published weights take gigabytes: these are the small CLIP that flow_trl ships and a head of constant weights on it.
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from flow_trl.tiny import CLIP_FOLDER
from flow_trl.tiny.scenes import render_scene


WIDTHS = {0: (64, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
HEAD = Path(tempfile.gettempdir(), "flow_trl_constant_head.safetensors")
weights = {f"layers.{layer}.weight": torch.zeros(outputs, inputs) for layer, (inputs, outputs) in WIDTHS.items()}
weights |= {f"layers.{layer}.bias": torch.full((outputs,), 5.0) for layer, (_, outputs) in WIDTHS.items()}
save_file(weights, HEAD)

test_cases = [
    {
        "predictions": [render_scene([{"class": "circle", "count": 1}], seed=seed) for seed in range(2)],
        "model": str(CLIP_FOLDER),
        "head": str(HEAD),
        "result": {"aesthetic": 5.0, "aesthetic_se": 0.0},
    },
]
