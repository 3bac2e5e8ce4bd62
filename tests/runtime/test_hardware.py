"""What the processor has decides the precision, on a busy machine too."""

import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from mmrec.runtime import hardware
from mmrec.runtime.hardware import (
    bfloat16_instructions,
    fastest_dtype,
    matrix_product_rate,
    resolve_precision,
)


def test_the_rate_is_measured_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        assert matrix_product_rate(dtype, (64, 32, 16), seconds=0) > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("has", "name"),
    [
        ({"avx2": True}, ""),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, ""),  # emulates bfloat16
        ({"avx512_f": True, "avx512_bf16": True}, "AVX-512 BF16"),
        ({"avx512_bf16": True, "amx_bf16": True, "amx_tile": True}, "AMX"),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, ""),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, "Arm BF16"),
    ],
)
def test_the_processor_decides(
    has: dict[str, object], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert bfloat16_instructions() == name
    assert fastest_dtype(name) == (torch.bfloat16 if name else torch.float32)


@pytest.mark.parametrize(
    ("machine", "avx512", "amx", "name"),
    [
        ("x86_64", False, False, ""),
        ("AMD64", True, False, "AVX-512 BF16"),
        ("x86_64", True, True, "AMX"),
        ("aarch64", False, False, "Arm BF16"),
    ],
)
def test_older_versions_of_torch_answer_too(
    machine: str, avx512: bool, amx: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(hardware.platform, "machine", lambda: machine)
    assert bfloat16_instructions() == name


def test_a_torch_without_onednn_takes_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True}, raising=False)
    assert bfloat16_instructions() == ""


def test_a_busy_machine_does_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No clock is read at all."""
    want = bfloat16_instructions()

    def watched(clock: Callable[[], float]) -> float:
        if threading.current_thread() is threading.main_thread():  # others may run servers
            raise AssertionError("a duration decided")
        return clock()

    for name in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(time, name, partial(watched, getattr(time, name)))
    assert bfloat16_instructions() == want


@pytest.mark.parametrize(
    ("precision", "instructions", "chosen", "reason"),
    [
        ("auto", "AMX", "bfloat16", "auto: the processor has AMX"),
        ("auto", "", "float32", "auto: the processor has no bfloat16 instructions"),
        ("float32", "AMX", "float32", "as set"),
        ("bfloat16", "AMX", "bfloat16", "as set"),
        ("bfloat16", "", "bfloat16", "as set; slow: the processor has no bfloat16 instructions"),
    ],
)
def test_precision(precision: str, instructions: str, chosen: str, reason: str) -> None:
    assert resolve_precision(precision, instructions) == (chosen, reason)
