"""Baselines of the kernels: other ways to compute the same, most of them optional packages.

Each function returns the implementations of one op, mmrec's first.

Axes: B batch, T time, D width, H heads, P head width.
"""

import importlib
import inspect
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import normalize

from mmrec import kernels
from mmrec.kernels.gated_delta_rule import reference as delta_rule_reference
from mmrec.kernels.gla import reference as gla_reference
from mmrec.kernels.kda import reference as kda_reference
from mmrec.kernels.scan import reference as scan_reference
from mmrec.kernels.selective_scan import reference as selective_scan_reference
from mmrec.kernels.ssd import reference as ssd_reference

Call = Callable[..., Tensor]
MAX_LOOP_ELEMENTS = 1 << 22
MAX_LOOP_STEPS = 4096
MAX_QUICK_LOOP_STEPS = 512
MAX_LOOP_STATES = 1 << 24  # numbers in all states of a loop, which autograd keeps several times
MIN_COMPILED_ELEMENTS = 1 << 16  # below, compilation takes longer than it saves
MAX_QUADRATIC_STEPS = 256
"""Steps up to which transformers' selective scan is run: its gradient takes time like T squared."""
SSD_CHUNK = 256  # steps per chunk, as Mamba 2's models have them
REFERENCE_CHUNK = 32  # steps per chunk of the chunked reference of the delta rule


@dataclass(frozen=True)
class HardwareLimit:
    """An operation that shows the most the machine can do, to be timed beside the others."""

    name: str
    call: Callable[[], Tensor]
    work: tuple[float, float, float]
    """Bytes or FLOPs of this call, of the op's forward pass, and of its forward and backward."""


@dataclass(frozen=True)
class Implementation:
    """A way to compute an op: ``call(*inputs)`` returns the output tensor."""

    name: str
    call: Call
    slow: bool = False
    """Timed fewer times."""


def _optional(module: str, attribute: str) -> Any | None:
    """The attribute of a module that may not be installed."""
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None


def loop_is_feasible(shape: tuple[int, ...], full: bool = True) -> bool:
    """Whether a Python loop over the time axis of a shape (B, T, …) ends in reasonable time.

    That is a minute if ``full``, else a second.
    """
    steps = MAX_LOOP_STEPS if full else MAX_QUICK_LOOP_STEPS
    return math.prod(shape) <= MAX_LOOP_ELEMENTS and shape[1] <= steps


def scan_baselines(shape: tuple[int, ...], full: bool = True) -> list[Implementation]:
    """Return implementations of the first-order scan of a and b, both (B, T, D).

    Without ``full`` those that take long to compile or to run are left out.
    """

    def loop(a: Tensor, b: Tensor) -> Tensor:
        return scan_reference.scan(a, b, torch.zeros_like(b[:, 0]))[0]

    found = [Implementation("mmrec", lambda a, b: kernels.scan(a, b)[0])]
    if loop_is_feasible(shape, full):
        found.append(Implementation("Python loop", loop, slow=True))
    associative_scan = _optional("torch._higher_order_ops", "associative_scan")
    if associative_scan is not None:

        def combine(left: Any, right: Any) -> Any:
            return left[0] * right[0], right[0] * left[1] + right[1]

        def torch_scan(a: Tensor, b: Tensor) -> Tensor:
            return associative_scan(combine, (a, b), dim=1, combine_mode="generic")[1]

        found.append(Implementation("torch associative_scan", torch_scan, slow=True))
        if full and shutil.which("c++") and math.prod(shape) >= MIN_COMPILED_ELEMENTS:
            compiled = torch.compile(torch_scan)
            found.append(Implementation("the same, compiled", compiled, slow=True))
    pscan = _optional("mambapy.pscan", "pscan")
    if pscan is not None:

        def mambapy_scan(a: Tensor, b: Tensor) -> Tensor:
            return pscan(a[..., None], b[..., None])[..., 0]

        found.append(Implementation("mambapy pscan", mambapy_scan, slow=True))
    accelerated_scan = _optional("accelerated_scan.ref", "scan")
    if accelerated_scan is not None:

        def tree_scan(a: Tensor, b: Tensor) -> Tensor:
            time_last = (x.transpose(1, 2).contiguous() for x in (a, b))
            return accelerated_scan(*time_last).transpose(1, 2)

        found.append(Implementation("accelerated-scan ref", tree_scan, slow=True))
    return found


def cumprod_baselines() -> list[Implementation]:
    """Return implementations of the cumulative product over time of gamma (B, T, D)."""
    return [
        Implementation("mmrec", lambda gamma: kernels.cumprod(gamma)[0]),
        Implementation("torch.cumprod", lambda gamma: torch.cumprod(gamma, 1), slow=True),
        Implementation(
            "exp(torch.cumsum(log))", lambda gamma: gamma.log().cumsum(1).exp(), slow=True
        ),
    ]


def _normalised(function: Callable[..., Any]) -> Call:
    """The output of a delta rule that divides queries and keys by their norms."""
    return lambda *x: function(*x, use_qk_l2norm_in_kernel=True)[0]


def delta_rule_reference_call(shape: tuple[int, ...]) -> Call:
    """The gated delta rule in torch, to compare with: in chunks where the shape allows it."""
    if shape[1] % REFERENCE_CHUNK == 0:
        return _normalised(delta_rule_reference.chunked)
    return delta_rule_loop


def delta_rule_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Run the gated delta rule step by step in torch: the reference.

    Args:
        q, k, v: (B, T, H, P).
        g, beta: (B, T, H), the log decay and the write strength.

    Returns:
        Outputs (B, T, H, P).
    """
    return delta_rule_reference.gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]


def delta_rule_baselines(shape: tuple[int, ...]) -> list[Implementation]:
    """Return implementations of the gated delta rule for q, k, v (B, T, H, P)."""

    found = [Implementation("mmrec", _normalised(kernels.gated_delta_rule))]
    if shape[1] % REFERENCE_CHUNK == 0:
        chunked = _normalised(delta_rule_reference.chunked)
        found.append(Implementation(f"chunks of {REFERENCE_CHUNK} in torch", chunked))
    fallback = _optional(
        "transformers.models.qwen3_5.modeling_qwen3_5", "torch_chunk_gated_delta_rule"
    )
    if fallback is not None:
        # without the decorator, which looks for a kernel of another package
        fallback = _normalised(inspect.unwrap(fallback))
        found.append(Implementation("transformers", fallback))
    fused = _optional("bitsandbytes.gdn_cpu", "fused_recurrent_gated_delta_rule")
    if fused is not None:

        def bitsandbytes(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
            q, k = normalize(q, dim=-1), normalize(k, dim=-1)
            output: Tensor = fused(
                q,
                k,
                v,
                beta,
                g,
                scale=q.shape[-1] ** -0.5,
                initial_state=None,
                output_final_state=True,
            )[0]
            return output

        found.append(Implementation("bitsandbytes-cpu-fork", bitsandbytes))
    if math.prod(shape) * shape[-1] <= MAX_LOOP_STATES:
        found.append(Implementation("Python loop", delta_rule_loop, slow=True))
    return found


def _zero_state(q: Tensor, v: Tensor) -> Tensor:
    return q.new_zeros(q.shape[0], *v.shape[2:3], q.shape[3], v.shape[3])


def kda_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Run Kimi Delta Attention step by step in torch: the reference.

    Args:
        q, k, v, g: (B, T, H, P); g is the log decay.
        beta: (B, T, H), the write strength.

    Returns:
        Outputs (B, T, H, P).
    """
    state = _zero_state(q, v)
    return kda_reference.kda(q, k, v, g, beta, state, use_qk_l2norm_in_kernel=True)[0]


def kda_baselines() -> list[Implementation]:
    """Return implementations of Kimi Delta Attention for q, k, v, g (B, T, H, P)."""

    def normalised(function: Callable[..., Any]) -> Call:
        return lambda *x: function(*x, use_qk_l2norm_in_kernel=True)[0]

    found = [Implementation("mmrec", normalised(kernels.kda))]
    fallback = _optional(
        "transformers.models.kimi_linear.modeling_kimi_linear", "chunk_kimi_delta_attention"
    )
    if fallback is not None:
        # without the decorator, which looks for a kernel of another package
        fallback = normalised(inspect.unwrap(fallback))
        found.append(Implementation("transformers", fallback, slow=True))
    found.append(Implementation("Python loop", kda_loop, slow=True))
    return found


def gla_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Run gated linear attention step by step in torch: the reference.

    Args:
        q, k, v: (B, T, H, P).
        g: log decays, (B, T, H, P), or (B, T, H) for ``simple_gla``.

    Returns:
        Outputs (B, T, H, P).
    """
    function = gla_reference.simple_gla if g.ndim == 3 else gla_reference.gla
    return function(q, k, v, g, _zero_state(q, v))[0]


def gla_baselines(shape: tuple[int, ...], per_head: bool) -> list[Implementation]:
    """Return implementations of gated linear attention for q, k, v (B, T, H, P).

    Args:
        shape: (B, T, H, P).
        per_head: g is (B, T, H), not (B, T, H, P).
    """

    def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return gla_reference.chunked(q, k, v, g, _zero_state(q, v))[0]

    op: Callable[..., Any] = kernels.simple_gla if per_head else kernels.gla
    found = [Implementation("mmrec", lambda *x: op(*x)[0])]
    size = gla_reference.CHUNK_PER_HEAD if per_head else gla_reference.CHUNK_PER_CHANNEL
    if shape[1] % size == 0:
        found.append(Implementation(f"chunks of {size} in torch", chunked))
    found.append(Implementation("Python loop", gla_loop, slow=True))
    return found


def selective_scan_loop(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Run the selective scan of u, delta (B, D, T), a (D, N), b, c (B, N, T) step by step."""
    return selective_scan_reference.selective_scan(u, delta, a, b, c, delta_softplus=True)[0]


def selective_scan_baselines(shape: tuple[int, ...]) -> list[Implementation]:
    """Return implementations of the selective scan for a shape (B, T, D, N)."""

    def with_softplus(function: Callable[..., Any], **options: Any) -> Call:
        return lambda *x: function(*x, delta_softplus=True, **options)

    found = [Implementation("mmrec", with_softplus(kernels.selective_scan_fn))]
    fallback = _optional("transformers.models.mamba.modeling_mamba", "mamba_selective_scan")
    if fallback is not None:
        # without the decorator, which looks for a kernel of another package
        fallback = inspect.unwrap(fallback)
        if shape[1] <= MAX_QUADRATIC_STEPS:
            found.append(Implementation("transformers", with_softplus(fallback), slow=True))
        if _optional("mambapy.pscan", "pscan") is not None:
            scan = with_softplus(fallback, use_mambapy=True)
            found.append(Implementation("mambapy", scan, slow=True))
    if loop_is_feasible((*shape[:2], shape[2] * shape[3])):
        found.append(Implementation("Python loop", selective_scan_loop, slow=True))
    return found


def ssd_loop(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Run Mamba 2's recurrence of x (B, T, H, P), dt (B, T, H), a (H,), b, c (B, T, 1, N)."""
    dt = torch.nn.functional.softplus(dt)
    return ssd_reference.ssd(x, dt, dt * a, b, c)[0]


def causal_conv1d_loop(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Causal depthwise convolution of x (B, D, L) with SiLU, tap by tap."""
    length, taps = x.shape[2], weight.shape[1]
    padded = functional.pad(x, (taps - 1, 0))
    out = bias[:, None] + sum(weight[:, n, None] * padded[..., n : n + length] for n in range(taps))
    return out * torch.sigmoid(out)


def causal_conv1d_baselines() -> list[Implementation]:
    """Return implementations of the causal depthwise convolution with SiLU."""

    def torch_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        padding = weight.shape[1] - 1
        out = functional.conv1d(x, weight[:, None], bias, padding=padding, groups=x.shape[1])
        return functional.silu(out[..., : x.shape[2]])

    ours = partial(kernels.causal_conv1d_fn, activation="silu")
    return [Implementation("mmrec", ours), Implementation("torch conv1d", torch_conv1d, slow=True)]


def ssd_baselines(shape: tuple[int, ...]) -> list[Implementation]:
    """Return implementations of Mamba 2's recurrence for a shape (B, T, H, P, N)."""

    def with_softplus(function: Callable[..., Any]) -> Call:
        return lambda *x: function(*x, SSD_CHUNK, dt_softplus=True)

    found = [Implementation("mmrec", with_softplus(kernels.mamba_chunk_scan_combined))]
    fallback = _optional("transformers.models.mamba2.modeling_mamba2", "mamba2_chunk_scan")
    if fallback is not None:
        fallback = with_softplus(inspect.unwrap(fallback))
        found.append(Implementation("transformers", fallback, slow=True))
    if loop_is_feasible((*shape[:2], math.prod(shape[2:]))):
        found.append(Implementation("Python loop", ssd_loop, slow=True))
    return found
