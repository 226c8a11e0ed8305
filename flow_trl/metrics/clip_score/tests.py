from flow_trl.metrics.images import draw_square
from flow_trl.tiny import CLIP_FOLDER


test_cases = [
    {
        "predictions": [draw_square("red"), draw_square("red")],
        "references": ["a photo of a red square", "a photo of a blue circle"],
        "model": str(CLIP_FOLDER),  # small, and of coloured shapes alone
        "result": {"clip_score": 47.0213, "clip_score_se": 28.5656, "scores": [75.5869, 18.4558]},
    },
]
