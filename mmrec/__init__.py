"""MM-Rec: recurrent language models for CPUs.

The kernels are in ``mmrec.kernels``, the model in ``mmrec.model``, its sizes in ``mmrec.config``.
"""

from mmrec.config import PRESETS, VERSION, ModelConfig, TrainConfig
from mmrec.errors import InputError

__version__ = VERSION
__all__ = ["PRESETS", "InputError", "ModelConfig", "TrainConfig", "__version__"]
