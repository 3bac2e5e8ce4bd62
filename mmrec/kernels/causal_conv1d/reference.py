"""Reference for the causal depthwise convolution: plain differentiable torch."""

import torch
from torch import Tensor
from torch.nn import functional


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """x (B, D, L), weight (D, W), initial_states (B, D, W - 1)."""
    channels, width = weight.shape
    if initial_states is None:
        initial_states = x.new_zeros(x.shape[0], channels, width - 1)
    padded = torch.cat((initial_states, x), -1)
    out = functional.conv1d(padded, weight[:, None], bias, groups=channels)
    return out if activation is None else functional.silu(out)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """x (B, D, S), conv_state (B, D, W - 1 or more): the output and the new conv_state."""
    joined = torch.cat((conv_state.to(x.dtype), x), -1)
    keep = weight.shape[1] - 1
    state = joined[..., conv_state.shape[2] - keep : conv_state.shape[2]]
    out = causal_conv1d(x, weight, bias, state, activation)
    return out, joined[..., joined.shape[2] - conv_state.shape[2] :]
