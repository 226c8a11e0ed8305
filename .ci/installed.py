"""Run where a wheel or an sdist of flow_trl is installed, outside of its clone: everything that belongs to it is there."""

import importlib.metadata
from importlib.resources import files

import flow_trl
from flow_trl import cards, publishing, tiny


assert "site-packages" in flow_trl.__file__, flow_trl.__file__
assert importlib.metadata.version("flow-trl") == flow_trl.__version__
for name in flow_trl.__all__:
    getattr(flow_trl, name)
for name in (
    "py.typed",
    "templates/model_card.md",
    "metrics/calibration/calibration.py",
    "metrics/calibration/README.md",
):
    assert (files("flow_trl") / name).is_file(), name
prompt = tiny.load_prompts("scenes", "test")[0]["prompt"]
tiny.load_flow_pipeline()(prompt, num_inference_steps=1, max_sequence_length=0)
tiny.load_diffusion_pipeline()(prompt, num_inference_steps=1)
tiny.load_language_model()
assert cards.diffusion_card and publishing.publish
