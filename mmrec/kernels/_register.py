"""Registers an op with torch: library entry, fake results for tracing, gradients.

Eager mode, ``torch.compile``, ``torch.export`` and activation checkpointing all call
``torch.ops.mmrec.<name>``. The gradient of a library op cannot be mapped (vmap) or pushed forward
(jvp). Under ``torch.func`` and in forward mode the same functions therefore run as an
``autograd.Function``, which allows both.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Function = Callable[..., Any]
_functorch: Any = torch._C._functorch


def transform_active() -> bool:
    """Whether a torch.func transform or forward mode is active."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _refuse_nested_jvp(full_name: str) -> None:
    """Refuse forward mode inside forward mode.

    torch calls a jvp rule with forward mode off, so the outer level would lose its tangents.
    """
    stack = _functorch.get_interpreter_stack() or []
    if sum(level.key() == _functorch.TransformType.Jvp for level in stack) > 1:
        raise RuntimeError(
            f"{full_name} has no forward mode inside forward mode: use reverse mode for one of them"
        )


def register(
    name: str,
    schema: str,
    forward: Function,
    fake: Function,
    *,
    setup_context: Function | None = None,
    backward: Function | None = None,
    vmap: Function | None = None,
    jvp: Function | None = None,
) -> Function:
    """Define ``mmrec::name`` and return the function that calls it.

    Args:
        name: of the op.
        schema: arguments and results in torch's schema language.
        forward: computes the results from CPU tensors; runs below autograd.
        fake: returns empty results with the same shape, dtype and contiguous strides.
        setup_context: called with (ctx, inputs, output), saves what backward needs.
        backward: called with (ctx, *gradients). Without it, differentiating raises RuntimeError.
        vmap: called with (info, in_dims, *args), as ``autograd.Function.vmap``. Without it torch
            runs the op once per element, and warns that this is slow.
        jvp: called with (ctx, *tangents), as ``autograd.Function.jvp``. Without it, forward mode
            raises RuntimeError.
    """
    full_name = f"mmrec::{name}"
    torch.library.define(full_name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(full_name, "CPU", forward)
    torch.library.register_fake(full_name, fake)
    op = getattr(torch.ops.mmrec, name).default

    def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """For an op without gradient."""

    def no_gradient(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"{full_name} has no gradient: a second derivative is not supported here"
        )

    def no_jvp(ctx: Any, *tangents: Tensor) -> None:
        raise RuntimeError(f"{full_name} has no forward-mode derivative (jvp): use reverse mode")

    setup_context, backward = setup_context or save_nothing, backward or no_gradient
    torch.library.register_autograd(full_name, backward, setup_context=setup_context)
    rules = {
        "forward": lambda *args: op(*args),
        "setup_context": setup_context,
        "backward": backward,
        "jvp": jvp or no_jvp,
    } | ({"vmap": vmap} if vmap else {})
    members: dict[str, Any] = {key: staticmethod(rule) for key, rule in rules.items()}
    members["generate_vmap_rule"] = vmap is None
    function: Any = type(f"_{name}", (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        if transform_active():
            _refuse_nested_jvp(full_name)
            return function.apply(*args)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return op(*args)
        # torch's own autograd rule would do the same, at a higher cost per call
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call
