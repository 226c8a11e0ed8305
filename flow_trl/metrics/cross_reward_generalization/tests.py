test_cases = [
    {
        "methods": ["DDPO", "DDPO", "DDPO", "TDPO-R", "TDPO-R", "TDPO-R"],
        "in_domain": [5.0, 6.0, 8.0, 5.0, 6.0, 7.0],
        "out_of_domain": [[0.4], [0.3], [0.1], [0.4], [0.5], [0.3]],
        "reward_names": ["pickscore"],
        "result": {
            "matched_score": 7.0,
            "pickscore": {
                "DDPO": {
                    "value_at_matched": 0.2,
                    "value_at_matched_se": None,
                    "change_from_start": -0.2,
                    "change_from_start_se": None,
                    "rank_correlation": -1.0,
                    "rank_correlation_se": None,
                },
                "TDPO-R": {
                    "value_at_matched": 0.3,
                    "value_at_matched_se": None,
                    "change_from_start": -0.1,
                    "change_from_start_se": None,
                    "rank_correlation": -0.5,
                    "rank_correlation_se": None,
                },
            },
        },
    },
]
