"""Recurrent modules with the interface of torch's.

``GRU`` and ``LSTM`` are ``torch.nn.GRU`` and ``torch.nn.LSTM`` with a faster forward and backward
pass. ``GatedRecurrence`` and ``GatedDeltaRule`` are layers that torch does not have.
"""

from mmrec.nn.gated import GatedDeltaRule, GatedRecurrence
from mmrec.nn.rnn import GRU, LSTM

__all__ = ["GRU", "LSTM", "GatedDeltaRule", "GatedRecurrence"]
