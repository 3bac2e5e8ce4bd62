"""Whom the kernels race: other ways to compute the same, most of them optional packages.

Each function gives contenders for one case, mmrec first.
"""

import importlib
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from mmrec import kernels
from mmrec.kernels.gated_delta_rule import reference as memory_reference
from mmrec.kernels.scan import reference as scan_reference

Call = Callable[..., Tensor]
LOOPED = 1 << 22  # elements up to which a Python loop over time is asked to run


@dataclass(frozen=True)
class Bound:
    """What the machine can do at most, as a call to time."""

    name: str
    call: Callable[[], Tensor]
    work: tuple[float, float, float]
    """Bytes or FLOPs of the call, of the op's forward pass, and of its forward and backward."""


@dataclass(frozen=True)
class Contender:
    """A way to compute an op: ``call(*inputs)`` gives the output tensor."""

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


def loops(shape: tuple[int, ...]) -> bool:
    """Whether a Python loop over time ends in reasonable time."""
    return math.prod(shape) <= LOOPED and shape[1] <= 4096


def scan(shape: tuple[int, ...]) -> list[Contender]:
    """First-order scan (B, T, D)."""

    def loop(a: Tensor, b: Tensor) -> Tensor:
        return scan_reference.scan(a, b, torch.zeros_like(b[:, 0]))[0]

    found = [Contender("mmrec", lambda a, b: kernels.scan(a, b)[0])]
    if loops(shape):
        found.append(Contender("Python loop", loop, slow=True))
    associative = _optional("torch._higher_order_ops", "associative_scan")
    if associative is not None:

        def combine(left: Any, right: Any) -> Any:
            return left[0] * right[0], right[0] * left[1] + right[1]

        def torch_scan(a: Tensor, b: Tensor) -> Tensor:
            return associative(combine, (a, b), dim=1, combine_mode="generic")[1]

        found.append(Contender("torch associative_scan", torch_scan, slow=True))
        if shutil.which("c++") and math.prod(shape) >= 1 << 16:  # worth the compiler it needs
            compiled = torch.compile(torch_scan)
            found.append(Contender("the same, compiled", compiled, slow=True))
    pscan = _optional("mambapy.pscan", "pscan")
    if pscan is not None:

        def mamba(a: Tensor, b: Tensor) -> Tensor:
            return pscan(a[..., None], b[..., None])[..., 0]

        found.append(Contender("mambapy pscan", mamba, slow=True))
    accelerated = _optional("accelerated_scan.ref", "scan")
    if accelerated is not None:

        def tree(a: Tensor, b: Tensor) -> Tensor:
            turned = (x.transpose(1, 2).contiguous() for x in (a, b))
            return accelerated(*turned).transpose(1, 2)

        found.append(Contender("accelerated-scan ref", tree, slow=True))
    return found


def product() -> list[Contender]:
    """Product scan (B, T, D)."""
    return [
        Contender("mmrec", lambda g: kernels.cumprod(g)[0]),
        Contender("torch.cumprod", lambda g: torch.cumprod(g, 1), slow=True),
        Contender("exp(torch.cumsum(log))", lambda g: g.log().cumsum(1).exp(), slow=True),
    ]


def memory_loop(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Gated delta rule step by step: the truth, and what a torch user writes first."""
    batch, _, heads, size = q.shape
    return memory_reference.gated_delta_rule(q, k, v, a, b, q.new_zeros(batch, heads, size, size))[
        0
    ]


def memory(shape: tuple[int, ...]) -> list[Contender]:
    """Associative memory (B, T, H, P)."""

    def chunked(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        batch, _, heads, size = q.shape
        start = q.new_zeros(batch, heads, size, size)
        return memory_reference.chunked(q, k, v, a, b, start)[0]

    found = [Contender("mmrec", lambda *x: kernels.gated_delta_rule(*x)[0])]
    if shape[1] % 32 == 0:
        found.append(Contender("chunks of 32 in torch", chunked))
    fused = _optional("bitsandbytes.gdn_cpu", "fused_recurrent_gated_delta_rule")
    if fused is not None:

        def bitsandbytes(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
            q, k = normalize(q, dim=-1), normalize(k, dim=-1)
            out: Tensor = fused(
                q,
                k,
                v,
                b.sigmoid(),
                logsigmoid(a),
                scale=1.0,
                initial_state=None,
                output_final_state=True,
            )[0]
            return out

        found.append(Contender("bitsandbytes-cpu-fork", bitsandbytes))
    found.append(Contender("Python loop", memory_loop, slow=True))
    return found
