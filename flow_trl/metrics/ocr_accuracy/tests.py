test_cases = [
    {
        "predictions": ["OPEN 24h", "cat"],
        "references": ["open", "car"],
        "result": {
            "edit_distance": 0.4583333333333333,
            "edit_distance_se": 0.20833333333333331,
            "flow_grpo": 0.8333333333333333,
            "flow_grpo_se": 0.16666666666666669,
            "exact": 0.0,
            "exact_se": 0.0,
        },
    },
]
