test_cases = [
    {
        "predictions": [["4", "5", "5", None], ["7", "7", "8", "9"]],
        "references": ["4", "7"],
        "confidences": [[0.9, 0.3, 0.4, None], [0.2, 0.5, 0.8, 0.1]],
        "k": [1, 2],
        "result": {
            "pass@1": 0.375,
            "pass@2": 2 / 3,
            "majority": 0.5,
            "highest_confidence": 0.5,
            "weighted_majority": 0.5,
        },
    },
]
