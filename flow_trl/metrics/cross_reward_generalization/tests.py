test_cases = [
    {
        "methods": ["DDPO", "DDPO", "DDPO", "TDPO-R", "TDPO-R", "TDPO-R"],
        "in_domain": [5.0, 6.0, 8.0, 5.0, 6.0, 7.0],
        "out_of_domain": [[20.0], [18.0], [14.0], [20.0], [20.0], [19.0]],
        "reward_names": ["pickscore"],
        "result": {"matched_score": 7.0},
    },
]
