test_cases = [
    {
        "predictions": [0.9, 0.8, 0.8, 0.3, 1.0],
        "references": [1, 1, 0, 0, 1],
        "result": {
            "accuracy": 0.6,
            "auroc": 11 / 12,
            "brier": 0.156,
            "ece": 0.2,
            "accuracy_se": 0.24494897427831783,
        },
    },
    {
        "predictions": [1.0, 0.0],
        "references": [1, 1],
        "result": {"accuracy": 1.0, "accuracy_se": 0.0, "auroc": None, "auroc_se": None, "brier": 0.5, "ece": 0.5},
    },
]
