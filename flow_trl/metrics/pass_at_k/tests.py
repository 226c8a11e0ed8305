test_cases = [
    {
        "predictions": [[1, 0, 0, 0], [1, 1, 0, 0]],
        "k": [1, 2],
        "result": {"pass@1": 0.375, "pass@1_se": 0.125, "pass@2": 2 / 3, "pass@2_se": 1 / 6},
    },
    {"predictions": [[0, 1, 0]], "result": {"pass@1": 1 / 3, "pass@1_se": None}},
]
