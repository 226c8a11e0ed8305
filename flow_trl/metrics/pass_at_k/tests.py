test_cases = [
    {
        "predictions": [[1, 0, 0, 0], [1, 1, 1, 1]],
        "k": [1, 2],
        "result": {"pass@1": 0.625, "pass@1_se": 0.375, "pass@2": 0.75, "pass@2_se": 0.25},
    },
    {"predictions": [[0, 0, 0]], "k": [3], "result": {"pass@3": 0.0, "pass@3_se": None}},
]
