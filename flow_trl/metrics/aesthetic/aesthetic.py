"""How beautiful people find images, as a module for `evaluate`."""

import datasets
import evaluate

from flow_trl.metrics import images
from flow_trl.rewards import clip


_DESCRIPTION = """\
Says how beautiful people find images, whatever their prompts, by LAION's predictor on CLIP embeddings.
"""

_KWARGS_DESCRIPTION = images.inputs_of_reward(
    "aesthetic", "AestheticScore", "between 4 and 7 for most", "`head` (its weights), ", has_prompts=False
)

_CITATION = """\
@misc{schuhmann2022aesthetic,
  title = {Improved Aesthetic Predictor},
  author = {Schuhmann, Christoph},
  year = {2022},
  url = {https://github.com/christophschuhmann/improved-aesthetic-predictor}
}
@inproceedings{black2024training,
  title = {Training Diffusion Models with Reinforcement Learning},
  author = {Black, Kevin and Janner, Michael and Du, Yilun and Kostrikov, Ilya and Levine, Sergey},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  url = {https://huggingface.co/papers/2305.13301}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AestheticScore(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Image()}),
            codebase_urls=["https://github.com/christophschuhmann/improved-aesthetic-predictor"],
            reference_urls=["https://huggingface.co/papers/2305.13301"],
        )

    def _compute(self, predictions, groups=None, **options):
        return images.mean_reward(
            "aesthetic", clip.AestheticScore, predictions, [""] * len(predictions), groups, options
        )
