# The published weights take gigabytes: these scores are those of the small CLIP that flow_trl ships.
from flow_trl.tiny import CLIP_FOLDER
from flow_trl.tiny.scenes import render_scene


PROMPTS = ["a photo of a red circle", "a photo of two blue squares"]
SCENES = [[{"class": "circle", "count": 1, "color": "red"}], [{"class": "square", "count": 2, "color": "blue"}]]

test_cases = [
    {
        "predictions": [render_scene(scene, seed=0) for scene in SCENES],
        "references": PROMPTS,
        "model": str(CLIP_FOLDER),
        "result": {},
    },
]
