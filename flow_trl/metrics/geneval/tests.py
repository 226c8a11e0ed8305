from PIL import Image, ImageDraw


def _square(color):
    image = Image.new("RGB", (32, 32), (245, 245, 245))
    ImageDraw.Draw(image).rectangle((10, 10, 21, 21), fill=color)
    return image


test_cases = [
    {
        "predictions": [True, False, True, True],
        "references": ["counting", "counting", "colors", "colors"],
        "result": {
            "counting": 0.5,
            "counting_se": 0.5,
            "colors": 1.0,
            "colors_se": 0.0,
            "overall": 0.75,
            "overall_se": 0.25,
        },
    },
    {
        "predictions": [_square("red"), _square("blue")],
        "references": [{"tag": "colors", "include": [{"class": "square", "count": 1, "color": "red"}]}] * 2,
        "detector": "flow_trl.tiny.detector.detect_shapes",
        "result": {"colors": 0.5, "colors_se": 0.5, "overall": 0.5, "correct": [True, False]},
    },
]
