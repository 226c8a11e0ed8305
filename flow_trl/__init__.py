"""
Trainers for TRL users that put the reward where it was earned: on a denoising step or on a block of text.

The public names are imported when they are first used, so `import flow_trl` itself loads neither torch nor
transformers.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .blocks import Block as Block
    from .policy import PipelinePolicy as PipelinePolicy
    from .trainer.blockwise_grpo_config import BlockwiseGRPOConfig as BlockwiseGRPOConfig
    from .trainer.blockwise_grpo_trainer import BlockwiseGRPOTrainer as BlockwiseGRPOTrainer
    from .trainer.ddpo_config import DDPOConfig as DDPOConfig
    from .trainer.ddpo_trainer import DDPOTrainer as DDPOTrainer
    from .trainer.flow_grpo_config import FlowGRPOConfig as FlowGRPOConfig
    from .trainer.flow_grpo_trainer import FlowGRPOTrainer as FlowGRPOTrainer
    from .trainer.tdpo_r_config import TDPORConfig as TDPORConfig
    from .trainer.tdpo_r_trainer import TDPORTrainer as TDPORTrainer
    from .trainer.tp_grpo_config import TPGRPOConfig as TPGRPOConfig
    from .trainer.tp_grpo_trainer import TPGRPOTrainer as TPGRPOTrainer

# Said by transformers of each image processor that diffusers names, used or not. The extra `clip` brings the faster ones.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in str(record.msg)
)

__version__ = "0.1.0"

_MODULES = {
    "Block": "flow_trl.blocks",
    "BlockwiseGRPOConfig": "flow_trl.trainer.blockwise_grpo_config",
    "BlockwiseGRPOTrainer": "flow_trl.trainer.blockwise_grpo_trainer",
    "DDPOConfig": "flow_trl.trainer.ddpo_config",
    "DDPOTrainer": "flow_trl.trainer.ddpo_trainer",
    "FlowGRPOConfig": "flow_trl.trainer.flow_grpo_config",
    "FlowGRPOTrainer": "flow_trl.trainer.flow_grpo_trainer",
    "PipelinePolicy": "flow_trl.policy",
    "TDPORConfig": "flow_trl.trainer.tdpo_r_config",
    "TDPORTrainer": "flow_trl.trainer.tdpo_r_trainer",
    "TPGRPOConfig": "flow_trl.trainer.tp_grpo_config",
    "TPGRPOTrainer": "flow_trl.trainer.tp_grpo_trainer",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
