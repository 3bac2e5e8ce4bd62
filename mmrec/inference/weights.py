"""Read the weights of a model for generation, with h5py and NumPy only."""

from typing import TYPE_CHECKING

import h5py
import numpy as np

from mmrec.checkpoint.hdf5 import read_array
from mmrec.checkpoint.weights import read_weight
from mmrec.config import ModelConfig, parameter_shapes

if TYPE_CHECKING:
    from mmrec.model import Model


def read_parameters(
    file: h5py.File, config: ModelConfig, lora: tuple[int, float] | None
) -> dict[str, np.ndarray]:
    """Read the parameters of a checkpoint. LoRA factors are merged into the weights.

    Args:
        file: The checkpoint, open for reading.
        config: The shape of its model.
        lora: Rank and alpha of the LoRA factors that it holds, or None.

    Returns:
        float32 arrays by the names that ``mmrec.model.Model`` gives them.

    Raises:
        KeyError: An array is missing.
        ValueError: An array has another shape, or is not what was stored.
    """
    parameters = {}
    for name, shape in parameter_shapes(config).items():
        values = read_weight(file, name, shape)
        module = name.removesuffix(".weight")
        if lora and f"model/{module}.lora_A" in file:
            rank, alpha = lora
            a = read_array(file, f"model/{module}.lora_A", np.float32, (rank, shape[1]))
            b = read_array(file, f"model/{module}.lora_B", np.float32, (shape[0], rank))
            values = values + np.float32(alpha / rank) * (b @ a)
        parameters[name] = values
    return parameters


def model_parameters(model: "Model") -> dict[str, np.ndarray]:
    """Return the parameters of a torch model in the same form, without a copy where possible."""
    from mmrec.lora import merged_parameters

    return {name: p.float().cpu().numpy() for name, p in merged_parameters(model)}
