import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from flow_trl.tiny import CLIP_FOLDER


# A head that finds all images alike.
_SIZES = {0: (64, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
_WEIGHTS = {f"layers.{i}.weight": torch.zeros(rows, columns) for i, (columns, rows) in _SIZES.items()}
_WEIGHTS |= {f"layers.{i}.bias": torch.zeros(rows) for i, (_, rows) in _SIZES.items()}
_WEIGHTS["layers.7.bias"] += 5.5
_HEAD = Path(tempfile.gettempdir()) / "flow_trl_constant_head.safetensors"
save_file(_WEIGHTS, _HEAD)

test_cases = [
    {
        "predictions": [Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")],
        "model": str(CLIP_FOLDER),
        "head": str(_HEAD),
        "result": {"aesthetic": 5.5, "aesthetic_se": 0.0, "scores": [5.5, 5.5]},
    },
]
