from flow_trl.metrics.images import draw_square
from flow_trl.tiny import CLIP_FOLDER


test_cases = [
    {
        "predictions": [draw_square("red"), draw_square("red")],
        "references": ["a photo of a red square", "a photo of a blue circle"],
        "model": str(CLIP_FOLDER),  # small, and of coloured shapes alone
        "result": {"pickscore": 17.0684, "pickscore_se": 10.3691, "scores": [27.4375, 6.6993]},
    },
]
