test_cases = [
    {
        "predictions": [["4", "5", "5", None], ["7", "7", "8", "9"]],
        "references": ["4", "7"],
        "confidences": [[0.9, 0.3, 0.4, None], [0.2, 0.5, 0.8, 0.1]],
        "k": [1, 2],
        "result": {
            "pass@1": 3 / 8,
            "pass@1_se": 1 / 8,
            "pass@2": 2 / 3,
            "pass@2_se": 1 / 6,
            "majority": 0.5,
            "majority_se": 0.5,
            "highest_confidence": 0.5,
            "highest_confidence_se": 0.5,
            "weighted_majority": 0.5,
            "weighted_majority_se": 0.5,
        },
    },
    {
        "predictions": [["4", "4", "5"]],
        "references": ["5"],
        "confidences": [[0.1, 0.2, 0.9]],
        "result": {"pass@1": 1 / 3, "pass@1_se": None, "majority": 0.0, "weighted_majority": 1.0},
    },
]
