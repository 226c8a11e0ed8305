"""Agreement of images with their prompts by CLIP, as a module for `evaluate`."""

import evaluate

from flow_trl.metrics import images
from flow_trl.rewards import clip


_DESCRIPTION = """\
Says how well images agree with their prompts, by a CLIP model: 100 times the cosine of both embeddings, at least 0
(CLIPScore).
"""

_KWARGS_DESCRIPTION = images.inputs_of_reward("clip_score", "ClipScore", "in [0, 100]")

_CITATION = """\
@inproceedings{hessel2021clipscore,
  title = {{CLIPScore}: A Reference-free Evaluation Metric for Image Captioning},
  author = {Hessel, Jack and Holtzman, Ari and Forbes, Maxwell and Le Bras, Ronan and Choi, Yejin},
  booktitle = {Conference on Empirical Methods in Natural Language Processing},
  year = {2021},
  url = {https://huggingface.co/papers/2104.08718}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ClipScore(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=images.PROMPTED,
            codebase_urls=["https://github.com/jmhessel/clipscore"],
            reference_urls=["https://huggingface.co/papers/2104.08718"],
        )

    def _compute(self, predictions, references, groups=None, **options):
        return images.mean_reward("clip_score", clip.ClipScore, predictions, references, groups, options)
