from PIL import Image, ImageDraw, ImageFont


def _write(text):
    image = Image.new("RGB", (256, 96), "white")
    ImageDraw.Draw(image).text((128, 48), text, fill="black", font=ImageFont.load_default(32), anchor="mm")
    return image


test_cases = [
    {
        "predictions": ["New Hope Cafe", "HOPE"],
        "references": ["Hope", "Rope"],
        "result": {"flow_grpo": 0.875, "flow_grpo_se": 0.125, "flow_trl": 0.375, "flow_trl_se": 0.375, "exact": 0.0},
    },
    {
        "predictions": [_write("Fresh Bread"), _write("Open Late")],
        "references": ["Fresh Bread", "Open"],
        "result": {"flow_grpo": 1.0, "flow_trl": 0.5, "exact": 0.5},
    },
]
