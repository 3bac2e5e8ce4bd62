"""Which decoder writes a text: the compiled one, or that in NumPy while nothing is compiled yet.

Compiling the decoder's kernel takes one core about 25 seconds, once for a processor and version.
``NumpyDecoder`` writes the few hundred tokens of a first text in a second.
"""

import math
import sys
from pathlib import Path

import numpy as np

from mmrec.checkpoint.header import read_metadata
from mmrec.config import ModelConfig, SamplingConfig, parameter_shapes
from mmrec.data.tokenizer import Tokenizer
from mmrec.inference.decoder import Decoder, Stream
from mmrec.inference.numpy_decoder import NumpyDecoder
from mmrec.kernels._cache_folder import CACHE_FOLDER

MOST_TOKENS = 1024
"""Tokens that NumPy reads and writes at most."""
MOST_WEIGHTS = 10_000_000
"""Weights that a token reads at most where NumPy is chosen. mini reads five million."""


def call_kernel() -> None:
    """Write a token by a toy model: the types of arguments are the same for all models."""
    config = ModelConfig(8, 1, 1, 257, "n")
    weights = {name: np.zeros(s, np.float32) for name, s in parameter_shapes(config).items()}
    decoder = Decoder(config, weights, Tokenizer("byte", ""), threads=1)
    decoder.decode([Stream(decoder.initial_state(), SamplingConfig(), seed=0, limit=1)], 1)


def _has_kernels() -> bool:
    """Whether a compiled kernel is kept, of any version and for any processor."""
    return CACHE_FOLDER is not None and any(CACHE_FOLDER.glob("mmrec-*/*.nbi"))


def kernel_is_ready() -> bool:
    """Whether the kernel for float32 weights is loaded, or kept for this processor and version.

    Meanwhile no other thread may call a kernel.
    """
    if "numba" not in sys.modules and not _has_kernels():
        return False  # without waiting for Numba
    from mmrec.kernels._jit import record_calls

    with record_calls() as calls:
        call_kernel()
    return all(call.is_ready() for call in calls.values())


def load_decoder(path: Path, tokens: int) -> Decoder:
    """Read the model of a checkpoint, for some work.

    Args:
        path: The checkpoint.
        tokens: How many tokens are read and written, at most.

    Returns:
        A ``NumpyDecoder`` if the work is small and the kernel would have to be compiled first.

    Raises:
        InputError: There is no complete checkpoint of this version at ``path``.
    """
    shapes = parameter_shapes(read_metadata(path).model_config)
    shapes.pop("ngram_embedding", None)
    is_small = tokens <= MOST_TOKENS and sum(map(math.prod, shapes.values())) <= MOST_WEIGHTS
    decoder = NumpyDecoder if is_small and not kernel_is_ready() else Decoder
    return decoder.load(path)
