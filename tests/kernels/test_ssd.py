"""Mamba 2's recurrence: against its reference, gradcheck, the laws, and transformers."""

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from mmrec.kernels import (
    causal_conv1d_fn,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    selective_state_update,
)
from mmrec.kernels.ssd import kernel, reference
from tests.kernels import laws

OP = torch.ops.mmrec.ssd.default
SINGLE = torch.float32


def inputs(
    b: int,
    t: int,
    h: int,
    p: int,
    n: int,
    g: int = 1,
    dtype: torch.dtype = torch.float64,
    states: int | None = None,
) -> list[Tensor]:
    """x, dt, B, C; A, D, dt_bias; state."""
    shapes = ((b, t, h, p), (b, t, h), (b, t, g, n), (b, t, g, n), (h,), (h, p), (h,))
    x, dt, b_, c, a, d, bias = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return [x, dt, b_, c, -a.abs(), d, bias, torch.randn(states or b, h, p, n, dtype=dtype)]


def op(*args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    x, dt, b, c, a, d, bias, state = args
    packed = "cu_seqlens" in options
    results: tuple[Tensor, Tensor] = mamba_chunk_scan_combined(
        x,
        dt,
        a,
        b,
        c,
        64,
        d,
        dt_bias=bias,
        initial_states=state,
        dt_softplus=True,
        return_final_states=not packed,
        return_varlen_states=packed,
        **options,
    )
    return results


def plain(*args: Tensor) -> tuple[Tensor, Tensor]:
    x, dt, b, c, a, d, bias, state = args
    dt = functional.softplus(dt + bias)
    return reference.ssd(x, dt, dt * a, b, c, d, state)


@given(
    st.integers(1, 2),
    st.sampled_from([1, 16, 33, 64, 65, 140]),
    st.sampled_from([(1, 1), (5, 1), (4, 2), (3, 3)]),
    st.sampled_from([(1, 1), (5, 4), (16, 17), (33, 16)]),
)
def test_agrees_with_reference(
    b: int, t: int, heads: tuple[int, int], sizes: tuple[int, int]
) -> None:
    args = inputs(b, t, heads[0], *sizes, heads[1])
    laws.agrees(op, plain, args, 1e-9)
    laws.agrees(op, plain, [x.float() for x in args], 5e-5)


def test_agrees_at_the_sizes_of_models() -> None:
    laws.agrees(op, plain, inputs(1, 70, 2, 64, 128), 1e-9)


def test_long_sequences_and_strong_decays_stay_exact() -> None:
    single = inputs(1, 600, 4, 4, 4, 1, SINGLE)
    single[4] = -(10 ** torch.linspace(-4, 2, 4))
    laws.agrees(op, plain, single, 5e-5)


def test_gradcheck() -> None:
    ready = [x.requires_grad_() for x in inputs(2, 4, 2, 3, 2)]
    assert torch.autograd.gradcheck(op, ready, fast_mode=True)
    ready = [x.requires_grad_() for x in inputs(1, 5, 2, 3, 2, states=3)]
    packed = partial(op, cu_seqlens=torch.tensor([0, 2, 2, 5]))
    assert torch.autograd.gradcheck(packed, ready, fast_mode=True)


@given(st.integers(1, 199))
def test_laws(at: int) -> None:
    args = inputs(2, 200, 3, 4, 5, 1, SINGLE)
    sequences, shared, state = args[:4], args[4:7], args[7]
    laws.is_causal(op, sequences, shared, state, at)
    laws.splits(op, sequences, shared, state, [kernel.CHUNK, 3 * kernel.CHUNK])
    # slices of one wide tensor, as a projection gives them
    flat = [x.flatten(2) for x in sequences]
    wide = torch.cat(flat, -1).split([x.shape[-1] for x in flat], -1)
    views = [y.unflatten(-1, x.shape[2:]) for y, x in zip(wide, sequences, strict=True)]
    for got, want in zip(op(*views, *shared, state), op(*args), strict=True):
        assert torch.equal(got, want)


@given(st.lists(st.integers(0, 150), max_size=4))
def test_packed_sequences_do_not_meet(cuts: list[int]) -> None:
    args = inputs(1, 150, 3, 4, 5, states=len(cuts) + 1)
    laws.packs(op, args[:4], args[4:7], args[7], cuts)


def test_seq_idx_and_cu_seqlens_say_the_same() -> None:
    *tensors, states = inputs(1, 150, 2, 4, 5, states=3)
    cu = torch.tensor([0, 64, 70, 150])
    numbers = torch.repeat_interleave(torch.tensor([7, 3, 9]), cu.diff())[None]
    states[1:] = 0
    want, each = op(*tensors, states, cu_seqlens=cu)
    out, last = op(*tensors, states[:1], seq_idx=numbers)
    assert torch.equal(out, want)
    assert torch.equal(last, each[-1:])
    both, _ = op(*tensors, states, cu_seqlens=cu, seq_idx=numbers)
    assert torch.equal(both, want)
    leaves = [[x.clone().requires_grad_() for x in tensors] for _ in range(2)]
    op(*leaves[0], states, cu_seqlens=cu)[0].sin().sum().backward()
    op(*leaves[1], states[:1], seq_idx=numbers)[0].sin().sum().backward()
    for x, y in zip(*leaves, strict=True):
        assert torch.equal(x.grad, y.grad)
    with pytest.raises(ValueError, match=r"seq_idx and cu_seqlens must cut at the same steps"):
        op(*tensors, states, cu_seqlens=cu, seq_idx=numbers.roll(1))


def test_threads_do_not_change_bits() -> None:
    laws.ignores_threads(op, inputs(2, 100, 10, 4, 5, 2, SINGLE))
    packed = partial(op, cu_seqlens=torch.tensor([0, 3, 3, 100]))
    laws.ignores_threads(packed, inputs(1, 100, 3, 4, 5, 1, SINGLE, 3))


def test_low_precision_and_modes() -> None:
    args = inputs(2, 20, 2, 4, 5, 1, SINGLE)
    laws.low_precision(op, args[:4], args[4:7], args[7])
    laws.works_without_gradients(op, args)
    laws.survives_checkpointing(op, args)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside inductor
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiles(backend: str) -> None:
    laws.compiles(op, inputs(2, 20, 2, 4, 5, 1, SINGLE), backend)
    cu = torch.tensor([0, 7, 20])
    laws.compiles(op, inputs(1, 20, 2, 4, 5, 1, SINGLE, 2), backend, cu_seqlens=cu)


def test_opcheck() -> None:
    x, dt, b, c, _, d, _, state = inputs(1, 70, 2, 4, 5, states=3)
    tensors = (x, dt, -dt.abs(), b, c, d)
    cu = torch.tensor([0, 3, 3, 70], dtype=torch.int32)
    torch.library.opcheck(OP, (*tensors, state, None, cu, False))
    ready = [y.detach().requires_grad_() for y in (*tensors, state)]
    torch.library.opcheck(OP, (*ready, None, cu, True))
    numbers = (torch.arange(70) // 40)[None]
    torch.library.opcheck(OP, (*ready[:-1], state[:1], numbers, None, True))


def test_chunk_states_are_few_and_only_for_gradients() -> None:
    """A state in 64 steps is saved; none where no gradient can be asked for."""
    size = laws.saves_only_for_gradients(op, OP, inputs(2, 130, 2, 16, 16))
    assert size == 2 * 3 * 2 * 16 * 16


@pytest.mark.parametrize("form", ["dt_limit", "z", "D per head", "bare"])
def test_every_form_agrees(form: str) -> None:
    x, dt, b, c, a, d, bias, _ = inputs(2, 30, 4, 3, 5, 2)
    z = torch.randn_like(x)
    options: dict[str, Any] = {
        "dt_limit": {"dt_softplus": True, "dt_limit": (0.2, 0.9)},
        "z": {"z": z, "dt_softplus": True},
        "D per head": {"D": d[:, 0], "dt_bias": bias},
        "bare": {},
    }[form]
    step = dt + options["dt_bias"] if "dt_bias" in options else dt
    step = functional.softplus(step) if "dt_softplus" in options else step
    step = step.clamp(*options.get("dt_limit", (0.0, torch.inf)))
    skip = d[:, :1].expand(4, 3) if "D" in options else None
    want, last = reference.ssd(x, step, step * a, b, c, skip)
    want = want * functional.silu(z) if "z" in options else want
    out, state = mamba_chunk_scan_combined(x, dt, a, b, c, 16, **options, return_final_states=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(state, last)
    assert torch.equal(mamba_chunk_scan_combined(x, dt, a, b, c, 256, **options), out)


def test_update_continues_the_recurrence() -> None:
    x, dt, b, c, a, d, bias, state = inputs(2, 6, 4, 3, 5, 2, SINGLE)
    want, last = op(x, dt, b, c, a, d, bias, state)
    for t in range(6):
        step = dt[:, t, :, None].expand(2, 4, 3)
        decay, shift = a[:, None, None].expand(4, 3, 5), bias[:, None].expand(4, 3)
        out = selective_state_update(
            state, x[:, t], step, decay, b[:, t], c[:, t], d, None, shift, True
        )
        torch.testing.assert_close(out, want[:, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def split_arguments(mlp: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    h, p, n, g, dim = 4, 3, 5, 2, 12
    channels = dim + 2 * g * n
    shapes = {
        "zxbcdt": (2, 20, 2 * mlp + dim + channels + h),
        "conv1d_weight": (channels, 4),
        "conv1d_bias": (channels,),
        "dt_bias": (h,),
        "A": (h,),
        "D": (h,),
        "initial_states": (2, h, p, n),
        "rmsnorm_weight": (dim,),
        "outproj_weight": (7, mlp + dim),
        "outproj_bias": (7,),
    }
    tensors = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    return tensors | {"A": -tensors["A"].abs()}


def plain_split(norm_before_gate: bool, **t: Any) -> Tensor:
    """mamba-ssm's reference of the fused layer, without its norm where no weight is given."""
    h, n, g, dim = 4, 5, 2, 12
    rest, z, xbc, dt = t["zxbcdt"].split(
        [t["zxbcdt"].shape[-1] - 2 * dim - 2 * g * n - h, dim, dim + 2 * g * n, h], -1
    )
    xbc = causal_conv1d_fn(
        xbc.transpose(1, 2), t["conv1d_weight"], t["conv1d_bias"], activation="silu"
    )
    x, b, c = xbc.transpose(1, 2).split([dim, g * n, g * n], -1)
    step = functional.softplus(dt + t["dt_bias"])
    b, c = (y.unflatten(-1, (g, n)) for y in (b, c))
    skip = t["D"][:, None].expand(4, 3)
    x = x.unflatten(-1, (h, 3))
    y, _ = reference.ssd(x, step, step * t["A"], b, c, skip, t["initial_states"])
    y, gate = y.flatten(2), functional.silu(z)
    if "rmsnorm_weight" not in t:
        y = y * gate
    else:
        y = y if norm_before_gate else y * gate
        groups = y.unflatten(-1, (g, -1))
        groups = groups * (groups.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        y = groups.flatten(-2) * t["rmsnorm_weight"]
        y = y * gate if norm_before_gate else y
    first, second = rest.chunk(2, -1)
    y = torch.cat((functional.silu(first) * second, y), -1)
    return functional.linear(y, t["outproj_weight"], t["outproj_bias"])


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("mlp", [0, 3])
@pytest.mark.parametrize("norm", [False, True])
def test_split_agrees(norm_before_gate: bool, mlp: int, norm: bool) -> None:
    named = split_arguments(mlp)
    names = [name for name in named if norm or "rms" not in name]

    def ours(*args: Tensor) -> tuple[Tensor, Tensor]:
        out = mamba_split_conv1d_scan_combined(
            **dict(zip(names, args, strict=True)),
            chunk_size=8,
            headdim=3,
            ngroups=2,
            norm_before_gate=norm_before_gate,
        )
        return out, out[:, -1]

    def theirs(*args: Tensor) -> tuple[Tensor, Tensor]:
        out = plain_split(norm_before_gate, **dict(zip(names, args, strict=True)))
        return out, out[:, -1]

    laws.agrees(ours, theirs, [named[name] for name in names], 1e-8)


def test_split_keeps_packed_sequences_apart() -> None:
    arguments = split_arguments()
    states = arguments.pop("initial_states")
    call = partial(
        mamba_split_conv1d_scan_combined, chunk_size=8, headdim=3, ngroups=2, activation="swish"
    )
    numbers = torch.tensor([0] * 7 + [1] * 13).expand(2, -1)
    out, last = call(**arguments, seq_idx=numbers, return_final_states=True)
    for begin, end in pairwise([0, 7, 20]):
        part = arguments | {"zxbcdt": arguments["zxbcdt"][:, begin:end]}
        want, state = call(**part, return_final_states=True)
        torch.testing.assert_close(out[:, begin:end], want)
    torch.testing.assert_close(last, state)
    assert last.shape == states.shape


def test_agrees_with_transformers() -> None:
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    args = inputs(2, 50, 4, 3, 5, 2, SINGLE)
    args[5] = args[5][:, 0]

    def call(function: Any, *args: Tensor) -> tuple[Tensor, Tensor]:
        x, dt, b, c, a, d, bias, state = args
        return function(
            x,
            dt,
            a,
            b,
            c,
            16,
            D=d,
            dt_bias=bias,
            initial_states=state,
            dt_softplus=True,
            return_final_states=True,
        )

    ours = partial(call, mamba_chunk_scan_combined)
    theirs = partial(call, mamba2.mamba2_chunk_scan.__wrapped__)
    for x, y in zip(ours(*args), theirs(*args), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    for x, y in zip(laws.gradients(ours, args), laws.gradients(theirs, args), strict=True):
        torch.testing.assert_close(x / y.abs().max(), y / y.abs().max(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3)}, r"x must have axes \(B, L, H, P\); got shape \(2, 3\)"),
        ({"dt": torch.ones(2, 5, 3)}, r"dt must have shape \(B, L, H\) = \(2, 5, 4\); got"),
        ({"A": torch.ones(3)}, r"A must have shape \(H\) = \(4,\); got \(3,\)"),
        ({"B": torch.ones(2, 5, 2)}, r"B must have axes \(B, L, G, N\); got \(2, 5, 2\)"),
        ({"B": torch.ones(2, 5, 3, 2)}, "G of B must divide H = 4; got 3"),
        ({"C": torch.ones(2, 5, 1, 2)}, r"C must have shape \(B, L, G, N\)"),
        ({"chunk_size": 0}, "chunk_size must be an integer >= 1; got 0"),
        ({"D": torch.ones(3)}, r"D must have shape \(H\)"),
        ({"D": torch.ones(4, 2)}, r"D must have shape \(H, P\) = \(4, 3\); got \(4, 2\)"),
        ({"z": torch.ones(2, 5, 4)}, r"z must have shape"),
        ({"dt_bias": torch.ones(1)}, r"dt_bias must have shape"),
        ({"initial_states": torch.ones(2, 4)}, r"initial_states must have shape"),
        ({"seq_idx": torch.ones(2, 4, dtype=torch.int32)}, r"seq_idx must have shape \(B, L\)"),
        ({"return_varlen_states": True}, "return_varlen_states needs cu_seqlens; got None"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "B of x must be 1; got 2"),
        ({"x": torch.ones(2, 5, 4, 3, device="meta")}, "x must be on the CPU"),
        ({"dt": torch.full((2, 5, 4), torch.nan), "check": True}, "dt must be finite"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments = {
        "x": torch.ones(2, 5, 4, 3),
        "dt": torch.ones(2, 5, 4),
        "A": torch.ones(4),
        "B": torch.ones(2, 5, 2, 2),
        "C": torch.ones(2, 5, 2, 2),
        "chunk_size": 8,
    }
    with pytest.raises(ValueError, match=message):
        mamba_chunk_scan_combined(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"headdim": None}, r"D must have axes \(H, P\), or \(H\) with headdim given"),
        ({"ngroups": 3}, "ngroups must divide H = 4; got 3"),
        ({"zxbcdt": torch.ones(2, 20, 40)}, r"zxbcdt must have 2 dim \+ 2 G N \+ H columns"),
        ({"outproj_weight": None}, "outproj_bias needs outproj_weight; got None"),
        ({"activation": "gelu"}, "activation must be None, 'silu' or 'swish'"),
        ({"rmsnorm_weight": torch.ones(3)}, r"rmsnorm_weight must have shape \(dim\) = \(12,\)"),
    ],
)
def test_bad_split(change: dict[str, Any], message: str) -> None:
    arguments = split_arguments(dtype=SINGLE) | {"chunk_size": 8, "headdim": 3, "ngroups": 2}
    with pytest.raises(ValueError, match=message):
        mamba_split_conv1d_scan_combined(**arguments | change)
