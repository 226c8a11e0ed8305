DOG = {"label": "dog", "color": None, "box": [10, 10, 60, 60], "score": 0.95}
CAT = {"label": "cat", "color": "black", "box": [100, 10, 150, 60], "score": 0.6}

test_cases = [
    {
        "predictions": [[DOG], [DOG, CAT], [DOG, CAT], [DOG, {**DOG, "score": 0.8}]],
        "include": [
            [{"class": "dog", "count": 1}],
            [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["right of", 0]}],
            [{"class": "cat", "count": 1, "color": "white"}],
            [{"class": "dog", "count": 2}],
        ],
        "tags": ["single_object", "position", "colors", "counting"],  # a dog of 0.8 does not count for "counting"
        "result": {
            "overall": 0.5,
            "overall_se": None,
            "single_object": 1.0,
            "single_object_se": None,
            "position": 1.0,
            "position_se": None,
            "colors": 0.0,
            "colors_se": None,
            "counting": 0.0,
            "counting_se": None,
        },
    },
]
