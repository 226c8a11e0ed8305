test_cases = [
    {
        "predictions": [0.9, 0.8, 0.8, 0.3, 1.0],
        "references": [1, 1, 0, 0, 1],
        "num_resamples": 100,
        "result": {"accuracy": 0.6, "auroc": 11 / 12, "brier": 0.156, "ece": 0.2},
    },
]
