"""How an op of ours becomes one of torch's: library entry, shapes for tracing, gradients.

Eager mode, ``torch.compile``, ``torch.export`` and checkpointing all meet ``torch.ops.mmrec.name``.
Its gradient cannot be mapped or pushed forward, so under ``torch.func`` and forward mode the same
functions run as an ``autograd.Function``, which can.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Function = Callable[..., Any]
_functorch: Any = torch._C._functorch


def _transformed() -> bool:
    """Whether a torch.func transform or forward mode is at work."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _refuse_nested_jvp(full: str) -> None:
    """torch calls a jvp rule with forward mode off, so an outer one would lose its tangents."""
    stack = _functorch.get_interpreter_stack() or []
    if sum(level.key() == _functorch.TransformType.Jvp for level in stack) > 1:
        raise RuntimeError(
            f"{full} has no forward mode inside forward mode: use reverse mode for one of them"
        )


def register(
    name: str,
    schema: str,
    run: Function,
    fake: Function,
    *,
    setup: Function | None = None,
    backward: Function | None = None,
    vmap: Function | None = None,
    jvp: Function | None = None,
) -> Function:
    """Define ``mmrec::name`` and return what calls it.

    Args:
        schema: arguments and results in torch's schema language.
        run: works on CPU tensors below autograd.
        fake: gives empty results of the right shape, dtype and contiguous strides.
        setup: called with (ctx, inputs, output) to keep what backward needs.
        backward: called with (ctx, *gradients); without it, differentiating raises RuntimeError.
        vmap: called with (info, in_dims, *args), as ``autograd.Function.vmap``; without it torch
            runs the op once for each element, and warns that this is slow.
        jvp: called with (ctx, *tangents), as ``autograd.Function.jvp``; without it, forward mode
            raises RuntimeError.
    """
    full = f"mmrec::{name}"
    torch.library.define(full, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(full, "CPU", run)
    torch.library.register_fake(full, fake)
    op = getattr(torch.ops.mmrec, name).default

    def keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """For an op without gradient."""

    def no_gradient(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(f"{full} has no gradient: a second derivative is not supported here")

    def no_jvp(ctx: Any, *tangents: Tensor) -> None:
        raise RuntimeError(f"{full} has no forward-mode derivative (jvp): use reverse mode")

    setup, backward = setup or keep_nothing, backward or no_gradient
    torch.library.register_autograd(full, backward, setup_context=setup)
    rules = {
        "forward": lambda *args: op(*args),
        "setup_context": setup,
        "backward": backward,
        "jvp": jvp or no_jvp,
    } | ({"vmap": vmap} if vmap else {})
    members: dict[str, Any] = {key: staticmethod(rule) for key, rule in rules.items()}
    members["generate_vmap_rule"] = vmap is None
    function: Any = type(f"_{name}", (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        if _transformed():
            _refuse_nested_jvp(full)
            return function.apply(*args)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():  # as torch's rule would, for less
            return op(*args)

    return call
