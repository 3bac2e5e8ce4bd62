"""mmrec.nn.GRU and LSTM against torch's: results, gradients, checkpoints, inputs, errors."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import mmrec.nn
from mmrec.nn import rnn

NAMES = ["GRU", "LSTM"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True, "num_layers": 2, "bidirectional": True},
    {"bias": False, "num_layers": 2},
]
LENGTHS = torch.tensor([9, 4, 12, 12, 1])
names = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _always_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run at every size, though torch is faster at the sizes of tests."""
    monkeypatch.setattr(rnn, "_is_worthwhile", lambda *_: True)


def pair(name: str, *args: Any, dtype: Any = torch.float64, **options: Any) -> tuple[Any, Any]:
    """torch's module, and ours with its weights."""
    theirs = getattr(nn, name)(*args, dtype=dtype, **options)
    ours = getattr(mmrec.nn, name)(*args, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tensors(value: Any) -> list[Tensor]:
    """All tensors of an output."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [x for part in value for x in tensors(part)]


def compare(theirs: Any, ours: Any, *inputs: Any) -> None:
    """Equal outputs, and equal gradients of an uneven function of all of them."""
    results = []
    for module in (theirs, ours):
        leaves = [x.detach().requires_grad_() for x in tensors(inputs)]
        remaining = iter(leaves)

        def rebuilt(value: Any, remaining: Any = remaining) -> Any:
            if isinstance(value, Tensor):
                return next(remaining)
            if isinstance(value, PackedSequence):
                return value._replace(data=next(remaining))
            return tuple(rebuilt(part) for part in value)

        outputs = tensors(module(*(rebuilt(x) for x in inputs)))
        loss = sum(((n + 1) * x.double()).sin().sum() for n, x in enumerate(outputs))
        results.append([*outputs, *torch.autograd.grad(loss, [*leaves, *module.parameters()])])  # type: ignore[arg-type]
    for want, got in zip(*results, strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


@names
@pytest.mark.parametrize("options", OPTIONS)
def test_results_and_gradients_are_torchs(name: str, options: dict[str, Any]) -> None:
    theirs, ours = pair(name, 5, 7, **options)
    x = torch.randn(5, 12, 5, dtype=torch.float64)
    compare(theirs, ours, x)
    state = theirs(x)[1]
    compare(theirs, ours, x, state)
    compare(theirs, ours, x[0])
    alone = state[:, 0] if name == "GRU" else tuple(s[:, 0] for s in state)
    compare(theirs, ours, x[0], alone)


@names
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("is_sorted", [False, True])
def test_packed_sequences_are_torchs(name: str, options: dict[str, Any], is_sorted: bool) -> None:
    theirs, ours = pair(name, 5, 7, **options)
    lengths = LENGTHS.sort(descending=True).values if is_sorted else LENGTHS
    packed = pack_padded_sequence(
        torch.randn(12, 5, 5, dtype=torch.float64), lengths, enforce_sorted=is_sorted
    )
    compare(theirs, ours, packed)
    compare(theirs, ours, packed, theirs(packed)[1])
    got, want = ours(packed)[0], theirs(packed)[0]
    assert torch.equal(got.batch_sizes, want.batch_sizes)
    assert (got.sorted_indices is None) == (want.sorted_indices is None)


@names
def test_checkpoints_go_both_ways_and_modules_can_be_copied(name: str) -> None:
    theirs, ours = pair(name, 3, 4, 2, bidirectional=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours, getattr(nn, name))
    for p in ours.parameters():
        nn.init.normal_(p)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(9, 2, 3, dtype=torch.float64)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ]
    for module in copies:
        assert type(module) is type(ours)
        compare(theirs, module, x)


@names
def test_weights_that_are_replaced_are_used(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    x = torch.randn(9, 2, 3, dtype=torch.float64)
    for module in (theirs, ours):
        torch.manual_seed(1)
        module.weight_hh_l0 = nn.Parameter(torch.randn_like(module.weight_hh_l0))
    compare(theirs, ours, x)
    compare(theirs.float(), ours.float(), x.float())
    nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    torch.testing.assert_close(ours(x.float())[0], theirs(x.float())[0])


@names
def test_dropout_acts_between_layers_in_training_only(name: str) -> None:
    theirs, ours = pair(name, 3, 4, 2, dropout=0.5)
    x = torch.randn(9, 2, 3, dtype=torch.float64)
    compare(theirs.eval(), ours.eval(), x)
    ours.train()
    assert not torch.equal(ours(x)[0], ours(x)[0])
    ours.dropout = 1.0
    state = ours(x)[1]
    state = state if name == "GRU" else state[0]
    zero, _ = pair(name, 4, 4)
    for p, q in zip(zero.parameters(), [*ours.parameters()][4:], strict=True):
        p.data = q.data
    want = zero(torch.zeros(9, 2, 4, dtype=torch.float64))[1]
    torch.testing.assert_close(state[1], (want if name == "GRU" else want[0])[0])


def test_projections_of_the_state_are_torchs() -> None:
    theirs, ours = pair("LSTM", 3, 6, 2, proj_size=2, bidirectional=True)
    compare(theirs, ours, torch.randn(9, 2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="proj_size"):
        mmrec.nn.GRU(3, 6, proj_size=2)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@names
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(name, 5, 7, 2, dtype=dtype)
    x = torch.randn(9, 3, 5).to(dtype)
    exact, _ = pair(name, 5, 7, 2)
    exact.load_state_dict(theirs.state_dict())
    for got, want, reference in zip(
        *(tensors(m(x.to(next(m.parameters()).dtype))) for m in (ours, exact, theirs)), strict=True
    ):
        assert got.dtype == reference.dtype == dtype
        error = (got.double() - want).abs().max()
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtypes_of_torchs_gru(
    weights: torch.dtype, given: torch.dtype, state: torch.dtype | None, autocast: torch.dtype
) -> None:
    """(torch.nn.LSTM refuses float32 inputs under autocast; ours follows the GRU.)"""
    theirs, ours = pair("GRU", 5, 7, dtype=weights)
    lstm = mmrec.nn.LSTM(5, 7, dtype=weights)
    x = torch.randn(9, 3, 5).to(given)
    hx = None if state is None else torch.randn(1, 3, 7).to(state)
    with torch.autocast("cpu", autocast):
        want, got = theirs(x, hx), ours(x, hx)
        others = tensors(lstm(x, None if hx is None else (hx, hx)))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=5e-2)
    assert {y.dtype for y in others} == {want[0].dtype}
    sum(y.float().sum() for y in (*got, *others)).backward()  # type: ignore[union-attr]
    for p in (*ours.parameters(), *lstm.parameters()):
        assert p.grad is not None
        assert p.grad.dtype == weights


@names
def test_mistakes_raise_torchs_errors(name: str) -> None:
    theirs, ours = pair(name, 3, 4, dtype=torch.float32)
    x, state = torch.ones(9, 2, 3), torch.ones(1, 2, 4)

    def states(value: Any) -> Any:
        return value if name == "GRU" else (value, value)

    for inputs in [
        (torch.ones(9, 2, 5),),
        (torch.ones(9),),
        (torch.ones(0, 2, 3),),
        (x.double(),),
        (x, states(torch.ones(2, 2, 4))),
        (x, states(torch.ones(1, 2, 5))),
        (x, states(torch.ones(2, 4))),
        (x[:, 0], states(state)),
        (None,),
        (x, 3),
    ]:
        raised = []
        for module in (theirs, ours):
            with pytest.raises(Exception) as error:  # noqa: PT011
                module(*inputs)
            raised.append((type(error.value), str(error.value)))
        assert raised[0] == raised[1]


@names
def test_function_transforms_take_torchs_path(name: str) -> None:
    theirs, ours = pair(name, 3, 4)
    x = torch.randn(9, 2, 3, dtype=torch.float64)
    for function in (torch.func.grad, lambda f: torch.func.jvp(f, (x,), (x,))[1]):
        results = []
        for module in (theirs, ours):
            loss = lambda x, m=module: m(x)[0].sin().sum()  # noqa: E731
            result = function(loss)
            results.append(result(x) if callable(result) else result)
        torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@names
def test_compile(name: str) -> None:
    """As torch's modules: with a graph break, or in one graph if Dynamo is told to take them."""
    theirs, ours = pair(name, 3, 4, 2, bidirectional=True)
    x = torch.randn(9, 2, 3, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's words about graph breaks
        torch._dynamo.reset()
        compare(theirs, torch.compile(ours, backend="aot_eager"), x)
        with torch._dynamo.config.patch(allow_rnn=True):
            torch._dynamo.reset()
            compare(theirs, torch.compile(ours, fullgraph=True, backend="aot_eager"), x)


@names
def test_small_calls_take_torchs_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    theirs, ours = pair(name, 3, 4, dtype=torch.float32)
    monkeypatch.setattr(rnn, "_run", None)  # would fail
    x = torch.randn(2, 2, 3)
    assert torch.equal(ours(x)[0], theirs(x)[0])
