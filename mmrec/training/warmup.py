"""Compiling kernels ahead of their first use, by several processes side by side.

Numba compiles in one thread at a time, so processes share the kernels among them. Each finds out
by itself what a command calls: it takes the command's steps with a small model while kernels only
note the types of their arguments (``record_calls``). ``SharedCache`` sees to it that no two
processes compile the same kernel, and that those which use it meanwhile wait for it.

    python -m mmrec.training.warmup train generate

is such a process. It writes a line of JSON for each kernel, and ends when its standard input does,
which the process that started it holds open.
"""

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from mmrec.config import ModelConfig, preset
from mmrec.data.dedup import SHINGLE_WORDS
from mmrec.evaluation.evaluate import evaluate
from mmrec.inference.decoder_choice import call_kernel
from mmrec.kernels._jit import KernelCall, record_calls
from mmrec.kernels._launch import compile_parallel_loop, parallel_threshold
from mmrec.kernels.rowwise_rmsprop.op import rowwise_rmsprop_
from mmrec.kernels.shingles.kernel import shingle_hashes
from mmrec.model import Model
from mmrec.runtime.distributed import SINGLE_PROCESS
from mmrec.runtime.hardware import resolve_precision

ROWS, STEPS = 2, 128
"""Batch and window of the steps that are taken. No kernel depends on sizes, except for windows of
a few tokens."""


def _shape() -> ModelConfig:
    """tiny, with a small vocabulary."""
    return dataclasses.replace(preset("tiny"), vocab_size=257, ngram_buckets=64)


def _model() -> Model:
    model = Model(_shape())
    model.set_precision(resolve_precision("auto", SINGLE_PROCESS.bfloat16_instructions())[0])
    return model


def _train() -> None:
    """A step of training, and what prepares a text for it."""
    text = np.frombuffer(b"a", np.uint8)
    ends = np.zeros(2, np.int64)
    shingle_hashes(text, ends[1:], SHINGLE_WORDS, np.empty(2, np.uint64), ends[1:])
    tokens = torch.zeros(ROWS, STEPS, dtype=torch.int64)
    loss, _ = _model().loss(tokens, tokens)
    loss.backward()
    table, row = torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64)
    rowwise_rmsprop_(table, torch.zeros(1), row, torch.ones(1, 8), lr=1.0)


def _evaluate() -> None:
    """Score a text: as training does, and as ``mmrec eval`` does, in float32."""
    for model in (_model(), Model(_shape())):
        evaluate(model, np.zeros(STEPS * ROWS, np.int64), eot=0, n_bytes=1)


PARTS: dict[str, Callable[[], None]] = {
    "train": _train,
    "eval": _evaluate,
    "generate": call_kernel,
}
"""What takes the steps of a command."""


def find_calls(parts: Iterable[str]) -> list[KernelCall]:
    """Return the calls of kernels that commands make, the longest to compile first.

    Args:
        parts: of ``PARTS``.
    """
    with record_calls() as calls, parallel_threshold(np.inf):
        for part in parts:
            PARTS[part]()
    return sorted(calls.values(), key=lambda call: -call.size)


def compile_missing(parts: Iterable[str], report: Callable[[dict[str, Any]], None]) -> None:
    """Compile what commands call and no process has compiled or compiles now.

    Args:
        parts: of ``PARTS``.
        report: called with ``missing``, the names of all kernels that are not ready; then with
            ``kernel`` and ``seconds`` for each that was compiled here, and ``error`` where it
            could not be kept.
    """
    waiting = [call for call in find_calls(parts) if not call.is_ready()]
    report({"missing": [call.name for call in waiting]})
    if waiting:
        compile_parallel_loop()
    while waiting:
        free = next((call for call in waiting if not call.is_being_compiled()), None)
        if free is None:
            return
        waiting.remove(free)
        if free.is_ready():  # by another process, since
            continue
        begin = time.perf_counter()
        error = free.compile()
        line = {"kernel": free.name, "seconds": round(time.perf_counter() - begin, 2)}
        report(line if error is None else line | {"error": error.strerror or str(error)})
        if error is not None:
            return


def end_with_parent() -> None:
    """From now on, end this process when the one that started it does, however that ends."""

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(0)  # files of the cache are written under other names first

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Compile the parts that the arguments name."""
    end_with_parent()
    compile_missing(sys.argv[1:], lambda line: print(json.dumps(line), flush=True))


if __name__ == "__main__":
    main()
