"""Mamba's selective scan: against its reference, gradcheck, the laws, and decoding."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from mmrec.kernels import (
    causal_conv1d_fn,
    mamba_inner_fn,
    selective_scan_fn,
    selective_state_update,
)
from mmrec.kernels.selective_scan import reference
from tests.kernels import laws

OP = torch.ops.mmrec.selective_scan.default
SINGLE = torch.float32


def inputs(
    b: int, t: int, d: int, n: int, dtype: torch.dtype = torch.float64, groups: int = 1
) -> list[Tensor]:
    """u, delta, z (B, L, D), b and c (B, L, G, N); A, D, bias; state: time before channels."""
    sequences = [torch.randn(b, t, d, dtype=dtype) for _ in range(3)]
    selections = [torch.randn(b, t, groups, n, dtype=dtype) for _ in range(2)]
    a = -3 * torch.rand(d, n, dtype=dtype)
    skip, bias = torch.randn(2, d, dtype=dtype)
    return [*sequences, *selections, a, skip, bias, torch.randn(b, d, n, dtype=dtype)]


def scan(
    function: Any,
    u: Tensor,
    delta: Tensor,
    z: Tensor,
    b: Tensor,
    c: Tensor,
    a: Tensor,
    skip: Tensor,
    bias: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    u, delta, z = (x.transpose(1, 2) for x in (u, delta, z))
    b, c = (x.permute(0, 2, 3, 1) for x in (b, c))
    out, last = function(u, delta, a, b, c, skip, z, bias, True, state)
    return out.transpose(1, 2), last


def _ours(*args: Any) -> Any:
    *tensors, state = args
    return selective_scan_fn(*tensors, return_last_state=True, initial_state=state)


op, plain = partial(scan, _ours), partial(scan, reference.selective_scan)


@given(
    st.integers(1, 2),
    st.sampled_from([1, 2, 16, 33, 70]),
    st.sampled_from([(1, 1), (5, 1), (16, 2), (34, 2)]),
    st.integers(1, 6),
)
def test_agrees_with_reference(b: int, t: int, channels: tuple[int, int], n: int) -> None:
    d, groups = channels
    laws.agrees(op, plain, inputs(b, t, d, n, groups=groups), 1e-10)
    laws.agrees(op, plain, inputs(b, t, d, n, SINGLE, groups), 2e-5)


def test_many_channels_agree() -> None:
    """More channels than one task has, and 16 states as in Mamba."""
    laws.agrees(op, plain, inputs(2, 40, 150, 16), 1e-10)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("present", ["", "D", "z", "delta_bias", "D z delta_bias"])
@pytest.mark.parametrize("time_last", [False, True])
def test_every_form_agrees(present: str, softplus: bool, time_last: bool) -> None:
    u, delta, z, b, c, a, skip, bias, _ = inputs(2, 20, 18, 3)
    delta = delta.abs()
    options = {"D": skip, "z": z.transpose(1, 2), "delta_bias": bias.abs()}
    names = present.split()

    def call(function: Any, *args: Tensor) -> tuple[Tensor, Tensor]:
        u, delta, a, b, c, *rest = args
        u, delta = (x.transpose(1, 2) for x in (u, delta))
        if time_last:
            u, delta, b, c = (x.contiguous() for x in (u, delta, b, c))
        given = dict(zip(names, rest, strict=True))
        if function is selective_scan_fn:
            return function(
                u, delta, a, b, c, **given, delta_softplus=softplus, return_last_state=True
            )
        given = {"d" if name == "D" else name: x for name, x in given.items()}
        return function(u, delta, a, b, c, **given, delta_softplus=softplus)

    selections = [x[:, :, 0].transpose(1, 2) for x in (b, c)]
    args = [u, delta, a, *selections, *(options[name] for name in names)]
    ours, theirs = partial(call, selective_scan_fn), partial(call, reference.selective_scan)
    laws.agrees(ours, theirs, args, 1e-10)
    assert ours(*args)[0].is_contiguous() == time_last


def test_selections_without_time_agree() -> None:
    u, delta, z, b, c, a, *rest = inputs(2, 20, 6, 3, groups=2)
    b, c = b[0, 0, 0].expand(6, 3) * a, torch.randn(6, 3, dtype=a.dtype)

    def call(function: Any, u: Tensor, delta: Tensor, b: Tensor, c: Tensor) -> Any:
        u, delta = (x.transpose(1, 2) for x in (u, delta))
        return function(u, delta, a, b, c, *rest[:1], z.transpose(1, 2), rest[1], True)

    ours = partial(call, partial(selective_scan_fn, return_last_state=True))
    laws.agrees(ours, partial(call, reference.selective_scan), [u, delta, b, c], 1e-10)


def test_long_sequences_and_strong_decays_stay_exact() -> None:
    single = inputs(1, 1000, 3, 4, SINGLE)
    single[5] *= 10 ** torch.linspace(-4, 2, 4)
    laws.agrees(op, plain, single, 3e-5)


def test_gradcheck() -> None:
    ready = [x.requires_grad_() for x in inputs(2, 4, 3, 2)]
    assert torch.autograd.gradcheck(op, ready, fast_mode=True)


@given(st.lists(st.integers(0, 40), max_size=3), st.integers(1, 39))
def test_laws(cuts: list[int], at: int) -> None:
    args = inputs(2, 40, 18, 4, SINGLE)
    sequences, shared, state = args[:5], args[5:8], args[8]
    laws.splits(op, sequences, shared, state, cuts)
    laws.is_causal(op, sequences, shared, state, at)
    laws.reads_strides(op, sequences, shared, state)


def test_memory_order_changes_no_bit() -> None:
    args = inputs(2, 40, 18, 4, SINGLE)

    def reordered(*args: Tensor) -> tuple[Tensor, Tensor]:
        first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in args[:3]]
        return op(*first, *args[3:])

    for got, want in zip(reordered(*args), op(*args), strict=True):
        assert torch.equal(got, want)
    for got, want in zip(laws.gradients(reordered, args), laws.gradients(op, args), strict=True):
        assert torch.equal(got, want)


def test_threads_do_not_change_bits() -> None:
    laws.ignores_threads(op, inputs(2, 40, 300, 4, SINGLE, 2))


def test_low_precision_and_modes() -> None:
    args = inputs(2, 20, 5, 4, SINGLE)
    laws.low_precision(op, args[:5], args[5:8], args[8])
    laws.works_without_gradients(op, args)
    laws.survives_checkpointing(op, args)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside inductor
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiles(backend: str) -> None:
    laws.compiles(op, inputs(2, 20, 18, 4, SINGLE), backend)


def test_opcheck() -> None:
    u, delta, z, b, c, a, skip, bias, state = inputs(2, 20, 18, 4, groups=2)
    u, delta, z = (x.transpose(1, 2) for x in (u, delta, z))
    b, c = (x.permute(0, 2, 3, 1) for x in (b, c))
    torch.library.opcheck(OP, (u, delta, a, b, c, None, None, None, state, False, False))
    ready = [x.detach().requires_grad_() for x in (u, delta.contiguous(), a, b, c, skip, z, bias)]
    torch.library.opcheck(OP, (*ready, state, True, True))


def test_tile_states_are_few_and_only_for_gradients() -> None:
    """A state in 32 steps is saved; none where no gradient can be asked for."""
    size = laws.saves_only_for_gradients(op, OP, inputs(2, 320, 32, 4))
    assert size == 2 * 10 * 32 * 4


def headed(b: int, h: int, p: int, n: int, g: int, *, tied: bool) -> dict[str, Any]:
    """Arguments of the update; tied: one decay per head, as in Mamba 2."""
    double = {"dtype": torch.float64}
    arguments = {
        "state": torch.randn(b, h, p, n, **double),
        "x": torch.randn(b, h, p, **double),
        "dt": torch.randn(b, h, 1 if tied else p, **double).expand(b, h, p),
        "A": -torch.rand(h, *((1, 1) if tied else (p, n)), **double).expand(h, p, n),
        "B": torch.randn(b, g, n, **double),
        "C": torch.randn(b, g, n, **double),
        "D": torch.randn(h, p, **double),
        "z": torch.randn(b, h, p, **double),
        "dt_bias": torch.randn(h, 1 if tied else p, **double).expand(h, p),
    }
    return arguments


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 70, 5, 2), (1, 1, 33, 16, 1), (2, 2, 3, 37, 1)])
@pytest.mark.parametrize("softplus", [False, True])
def test_update_agrees_with_reference(
    tied: bool, shape: tuple[int, int, int, int, int], softplus: bool
) -> None:
    arguments = headed(*shape, tied=tied)
    out, state = reference.selective_state_update(*arguments.values(), softplus)
    for dtype, tolerance in ((torch.float64, 1e-12), (SINGLE, 1e-5)):
        own = {name: x.to(dtype, copy=name == "state") for name, x in arguments.items()}
        got = selective_state_update(**own, dt_softplus=softplus)
        torch.testing.assert_close(got.double(), out, rtol=tolerance, atol=10 * tolerance)
        torch.testing.assert_close(
            own["state"].double(), state, rtol=tolerance, atol=10 * tolerance
        )
    if shape[1] == 1:  # one head: its axis may be left out
        one = {
            name: (x[0] if name in ("A", "D", "dt_bias") else x[:, 0]).clone()
            for name, x in arguments.items()
        }
        got = selective_state_update(**one, dt_softplus=softplus)
        torch.testing.assert_close(got, out[:, 0])
        torch.testing.assert_close(one["state"], state[:, 0])
    bare = {name: arguments[name].clone() for name in ("state", "x", "dt", "A", "B", "C")}
    out, _ = reference.selective_state_update(*bare.values())
    torch.testing.assert_close(selective_state_update(**bare), out)


def test_update_continues_the_scan() -> None:
    u, delta, z, b, c, a, skip, bias, state = inputs(2, 6, 21, 4, SINGLE)
    want, last = op(u, delta, z, b, c, a, skip, bias, state)
    for t in range(6):
        out = selective_state_update(
            state, u[:, t], delta[:, t], a, b[:, t, 0], c[:, t, 0], skip, z[:, t], bias, True
        )
        torch.testing.assert_close(out, want[:, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_update_in_low_precision_rounds_the_state_once() -> None:
    arguments = headed(1, 2, 5, 4, 1, tied=False)
    half = {name: x.bfloat16() for name, x in arguments.items()}
    wide = {name: x.float() for name, x in half.items()}
    out, want = selective_state_update(**half), selective_state_update(**wide)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want.bfloat16())
    assert torch.equal(half["state"], wide["state"].bfloat16())


def test_update_of_chosen_states_and_padding() -> None:
    arguments = headed(3, 2, 5, 4, 1, tied=False)
    pool = torch.randn(5, 2, 5, 4, dtype=torch.float64)
    places, used = torch.tensor([4, -1, 0]), [0, 2]
    own = {
        name: x[used] if name in ("x", "dt", "B", "C", "z") else x for name, x in arguments.items()
    }
    own["state"] = pool[[4, 0]]
    want = selective_state_update(**own)
    for grad in (False, True):
        state = pool.clone()
        x = arguments["x"].clone().requires_grad_(grad)
        out = selective_state_update(
            **arguments | {"state": state, "x": x}, state_batch_indices=places
        )
        torch.testing.assert_close(out[used], want)
        assert torch.equal(out[1], torch.zeros_like(out[1]))
        torch.testing.assert_close(state[[4, 0]], own["state"])
        assert torch.equal(state[1:4], pool[1:4])
        assert out.requires_grad == grad


def test_update_compiles() -> None:
    arguments = headed(1, 2, 5, 4, 1, tied=True)
    own = arguments | {"state": arguments["state"].clone()}
    compiled = torch.compile(selective_state_update, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**own), selective_state_update(**arguments))
    assert torch.equal(own["state"], arguments["state"])


def test_update_ignores_threads() -> None:
    threads, results = torch.get_num_threads(), []
    arguments = headed(2, 3, 130, 16, 1, tied=False)
    try:
        with laws.parallel_threshold(0):
            for count in (1, 4):
                torch.set_num_threads(count)
                own = arguments | {"state": arguments["state"].clone()}
                results.append((selective_state_update(**own), own["state"]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def inner_arguments(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    d, n, rank = 6, 3, 2
    shapes = {
        "xz": (2, 2 * d, 10),
        "conv1d_weight": (d, 1, 4),
        "conv1d_bias": (d,),
        "x_proj_weight": (rank + 2 * n, d),
        "delta_proj_weight": (d, rank),
        "out_proj_weight": (5, d),
        "out_proj_bias": (5,),
        "A": (d, n),
        "D": (d,),
        "delta_bias": (d,),
        "B_proj_bias": (n,),
        "C_proj_bias": (n,),
        "b_rms_weight": (n,),
        "c_rms_weight": (n,),
        "dt_rms_weight": (d,),
    }
    # small, because torch's softplus(x) is x for x > 20
    tensors = {name: torch.randn(shape, dtype=dtype) / 2 for name, shape in shapes.items()}
    return tensors | {"A": -tensors["A"].abs()}


def plain_inner(**t: Any) -> Tensor:
    """mamba-ssm's reference of the fused layer, with its norms."""
    n, rank = t["A"].shape[1], t["delta_proj_weight"].shape[1]
    x, z = t["xz"].chunk(2, 1)
    u = causal_conv1d_fn(x, t["conv1d_weight"][:, 0], t["conv1d_bias"], activation="silu")
    found = u.transpose(1, 2) @ t["x_proj_weight"].T
    delta, b, c = found.split([rank, n, n], -1)
    delta = delta @ t["delta_proj_weight"].T
    b, c = b + t["B_proj_bias"], c + t["C_proj_bias"]
    if "b_rms_weight" in t:
        b, c, delta = (
            x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * t[f"{name}_rms_weight"]
            for x, name in ((b, "b"), (c, "c"), (delta, "dt"))
        )
    b, c, delta = (x.transpose(1, 2) for x in (b, c, delta))
    y, _ = reference.selective_scan(u, delta, t["A"], b, c, t["D"], z, t["delta_bias"], True)
    return functional.linear(y.transpose(1, 2), t["out_proj_weight"], t["out_proj_bias"])


@pytest.mark.parametrize("norms", [False, True])
def test_inner_agrees(norms: bool) -> None:
    named = inner_arguments()
    names = [name for name in named if norms or "rms" not in name]

    def call(function: Any, *args: Tensor) -> tuple[Tensor, Tensor]:
        out = function(**dict(zip(names, args, strict=True)))
        return out, out[:, -1]

    tensors = [named[name] for name in names]
    laws.agrees(partial(call, mamba_inner_fn), partial(call, plain_inner), tensors, 1e-10)


@pytest.mark.parametrize("use_mambapy", [False, True])
def test_agrees_with_transformers(use_mambapy: bool) -> None:
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    if use_mambapy:
        pytest.importorskip("mambapy.pscan")
    u, delta, z, b, c, a, skip, bias, _ = inputs(2, 33, 18, 4, SINGLE)

    def call(function: Any, *args: Tensor) -> tuple[Tensor, Tensor]:
        u, delta, a, b, c, skip, z, bias = args
        u, delta, z, b, c = (x.transpose(1, 2) for x in (u, delta, z, b[:, :, 0], c[:, :, 0]))
        return function(u, delta, a, b, c, skip, z, bias, True, return_last_state=True)

    theirs = partial(mamba.mamba_selective_scan.__wrapped__, use_mambapy=use_mambapy)
    args = [u, delta, a, b, c, skip, z, bias]
    got, want = call(selective_scan_fn, *args), call(theirs, *args)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    pairs = zip(
        laws.gradients(partial(call, selective_scan_fn), args),
        laws.gradients(partial(call, theirs), args),
        strict=True,
    )
    for x, y in pairs:
        torch.testing.assert_close(x / y.abs().max(), y / y.abs().max(), rtol=0, atol=1e-4)


def test_update_agrees_with_transformers() -> None:
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    for function, tied in ((mamba.mamba_selective_state_update, False), (mamba2, True)):
        arguments = headed(2, 4 if tied else 1, 5, 3, 2 if tied else 1, tied=tied)
        if not tied:
            arguments = {
                name: x[0] if name in ("A", "D", "dt_bias") else x[:, 0]
                for name, x in arguments.items()
            }
        theirs = function.mamba2_selective_state_update if tied else function
        other = {name: x.float().clone() for name, x in arguments.items()}
        own = {name: x.float().clone() for name, x in arguments.items()}
        other["hidden_states"] = other.pop("x")
        want = theirs.__wrapped__(**other, dt_softplus=True)
        torch.testing.assert_close(selective_state_update(**own, dt_softplus=True), want)
        torch.testing.assert_close(own["state"], other["state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.ones(2, 3)}, r"u must have axes \(B, D, L\); got shape \(2, 3\)"),
        ({"delta": torch.ones(2, 4, 4)}, r"delta must have shape \(B, D, L\) = \(2, 4, 5\); got"),
        ({"A": torch.ones(3, 2)}, r"A must have shape \(D, N\) = \(4, 2\); got \(3, 2\)"),
        ({"A": torch.ones(4, 2) * 1j}, "A must be real floating-point numbers; got"),
        ({"B": torch.ones(2)}, r"B must have axes \(D, N\), \(B, N, L\) or \(B, G, N, L\); got"),
        ({"B": torch.ones(2, 3, 2, 5)}, "G of B must divide D = 4; got 3"),
        ({"C": torch.ones(2, 3, 5)}, r"C must have shape \(B, N, L\) = \(2, 2, 5\); got"),
        ({"D": torch.ones(3)}, r"D must have shape \(D\) = \(4,\); got \(3,\)"),
        ({"delta_bias": torch.ones(4, 1)}, r"delta_bias must have shape \(D\)"),
        ({"z": torch.ones(2, 4)}, r"z must have shape \(B, D, L\)"),
        ({"initial_state": torch.ones(2, 4)}, r"initial_state must have shape \(B, D, N\)"),
        ({"u": torch.ones(2, 4, 5, dtype=torch.int32)}, "u must have one of the dtypes"),
        ({"u": torch.ones(2, 4, 5, device="meta")}, "u must be on the CPU"),
        ({"A": torch.full((4, 2), torch.inf), "check": True}, "A must be finite"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments = {
        "u": torch.ones(2, 4, 5),
        "delta": torch.ones(2, 4, 5),
        "A": torch.ones(4, 2),
        "B": torch.ones(2, 2, 5),
        "C": torch.ones(2, 2, 5),
    }
    with pytest.raises(ValueError, match=message):
        selective_scan_fn(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": torch.ones(2, 5)}, r"state must have axes \(B, D, N\) or \(B, H, P, N\)"),
        ({"x": torch.ones(2, 5)}, r"state must have shape|x must have shape"),
        ({"A": torch.ones(4, 3)}, r"A must have shape \(D, N\) = \(4, 2\); got"),
        ({"B": torch.ones(2, 2, 2)}, "G of B must divide H = 1; got 2"),
        ({"state_batch_indices": torch.tensor([0, 5])}, "state_batch_indices must be different"),
    ],
)
def test_bad_update(change: dict[str, Any], message: str) -> None:
    arguments = {
        "state": torch.ones(2, 4, 2),
        "x": torch.ones(2, 4),
        "dt": torch.ones(2, 4),
        "A": torch.ones(4, 2),
        "B": torch.ones(2, 2),
        "C": torch.ones(2, 2),
    }
    with pytest.raises(ValueError, match=message):
        selective_state_update(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_lvl": 2}, "checkpoint_lvl must be 0 or 1; got 2"),
        ({"conv1d_weight": torch.ones(6, 4)}, r"conv1d_weight must have axes \(D, 1, W\); got"),
        ({"xz": torch.ones(2, 10, 5)}, r"xz must have 2 D = 12 channels; got 10"),
    ],
)
def test_bad_inner(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mamba_inner_fn(**inner_arguments(SINGLE) | change)
