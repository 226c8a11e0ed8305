"""How much people would prefer images for their prompts, as a module for `evaluate`."""

import evaluate

from flow_trl.metrics import images
from flow_trl.rewards import clip


_DESCRIPTION = """\
Says how much people would prefer images for their prompts, by a CLIP model that was trained on such choices (PickScore).
"""

_KWARGS_DESCRIPTION = images.inputs_of_reward("pickscore", "PickScore", "around 20 for most")

_CITATION = """\
@inproceedings{kirstain2023pickapic,
  title = {{Pick-a-Pic}: An Open Dataset of User Preferences for Text-to-Image Generation},
  author = {Kirstain, Yuval and Polyak, Adam and Singer, Uriel and Matiana, Shahbuland and Penna, Joe and Levy, Omer},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  url = {https://huggingface.co/papers/2305.01569}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PickScore(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=images.PROMPTED,
            codebase_urls=["https://github.com/yuvalkirstain/PickScore"],
            reference_urls=["https://huggingface.co/papers/2305.01569"],
        )

    def _compute(self, predictions, references, groups=None, **options):
        return images.mean_reward("pickscore", clip.PickScore, predictions, references, groups, options)
