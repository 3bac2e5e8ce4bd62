"""Compiling ahead: what is compiled is what commands call, and the process ends with its parent."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from numba import config

from mmrec.cli import warmup
from mmrec.training import warmup as compiler

pytestmark = pytest.mark.skipif(config.DISABLE_JIT, reason="nothing is compiled")  # type: ignore[attr-defined]

CHECK = """
import sys
from numba.core import event
from mmrec.training.warmup import PARTS, find_calls
from mmrec.kernels._jit import _dispatchers

noted = {(c.dispatcher, c.types) for c in find_calls(PARTS)}
assert len(noted) > 10

from mmrec.cli.main import build_command

def run(*words):
    build_command().main(list(words), "mmrec", standalone_mode=False)

small = ["--tokenizer=byte", "--batch-size=4", "--seq-len=64", "--eval-tokens=2100"]
run("train", "tiny", "--data=book.txt", "--steps=1", "--out=run", *small)
run("eval", "run")
run("generate", "run", "--prompt=def", "--max-tokens=3")
run("score", "book.txt", "--model=run")
called = {(d, types) for d in _dispatchers for types in d.overloads}
assert called
print({d.py_func.__name__ for d, types in called - noted})
"""


def test_the_command_knows_the_parts() -> None:
    assert list(warmup.PARTS) == list(compiler.PARTS)


def test_commands_call_no_other_kernels(tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "book.txt").write_text(text_file.read_text())
    run = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "set()"


def test_what_is_ready_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch, run_command: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    """Two compilers share the kernels that are missing; the next command finds none missing."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(cache))
    code = (
        "import sys; from mmrec.training import warmup; from mmrec.kernels import relu_squared\n"
        "import torch; warmup.PARTS = {'train': lambda: relu_squared(torch.ones(9))}; warmup.main()"
    )
    monkeypatch.setattr(warmup, "COMPILER", ["-c", code])
    out, _ = run_command(tmp_path, "warmup", "train", "--processes", "1")
    assert "relu_squared_fwd" in out
    assert "(1 of 1)" in out
    assert len([*cache.rglob("*relu_squared_fwd*.nbc")]) == 1
    out, _ = run_command(tmp_path, "warmup", "train", "--processes", "1")
    assert "relu_squared_fwd" not in out


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_compiler_ends_with_its_parent() -> None:
    code = (
        "import time; from mmrec.cli import warmup\n"
        "warmup.COMPILER = ['-c', 'from mmrec.training.warmup import end_with_parent as e; e(); "
        "import time; time.sleep(99)']\n"
        "c = warmup.Compiler([], print); print(c._process.pid, flush=True); time.sleep(99)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_compiler_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, run_command: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    monkeypatch.setattr(warmup, "COMPILER", ["-c", "raise SystemExit('out of luck')"])
    _, errors = run_command(tmp_path, "warmup", code=2)
    assert errors == "error: a compiler failed: out of luck\n"


def test_the_report_of_a_compiler_is_json() -> None:
    lines: list[object] = []
    compiler.compile_missing([], lines.append)
    assert json.loads(json.dumps(lines)) == [{"missing": []}]
