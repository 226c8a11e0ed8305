from pathlib import Path

from PIL import Image, ImageDraw

import flow_trl


def _square(color):
    image = Image.new("RGB", (32, 32), (245, 245, 245))
    ImageDraw.Draw(image).rectangle((10, 10, 21, 21), fill=color)
    return image


test_cases = [
    {
        "predictions": [_square("red"), _square("red")],
        "references": ["a photo of a red square", "a photo of a blue circle"],
        "model": str(Path(flow_trl.__file__).with_name("tiny") / "clip"),  # small, and of coloured shapes alone
        "result": {"clip_score": 47.0213, "clip_score_se": 28.5656, "scores": [75.5869, 18.4558]},
    },
]
