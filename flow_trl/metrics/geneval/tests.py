from flow_trl.metrics.images import draw_square


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
        "predictions": [draw_square("red"), draw_square("blue")],
        "references": [{"tag": "colors", "include": [{"class": "square", "count": 1, "color": "red"}]}] * 2,
        "detector": "flow_trl.tiny.detector.detect_shapes",
        "result": {"colors": 0.5, "colors_se": 0.5, "overall": 0.5, "correct": [True, False]},
    },
]
