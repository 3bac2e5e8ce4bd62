"""The cache of compiled kernels: several processes, folders that cannot be written."""

import ast
import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numba import config

from mmrec.kernels import _jit
from mmrec.kernels._jit import SharedCache, compiled_kernel, record_calls
from mmrec.kernels._launch import ParallelKernel

pytestmark = pytest.mark.skipif(config.DISABLE_JIT, reason="nothing is compiled")  # type: ignore[attr-defined]

KERNEL = """
from mmrec.kernels._jit import compiled_kernel

@compiled_kernel
def add_one(x):
    for i in range(x.size):
        x[i] += 1
"""
USE = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
if len(sys.argv) > 2:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
import small
x = np.zeros(3)
small.add_one(x)
print(x.tolist(), sum(small.add_one.stats.cache_hits.values()))
"""


PARALLEL = """
from mmrec.kernels._jit import inline_jit
from mmrec.kernels._launch import parallel_kernel

@inline_jit
def amount(x):
    return x.dtype.type(1)

@parallel_kernel
def body(task, x):
    x[task] += amount(x)

class add_one:
    stats = body.loop.stats
    def __new__(cls, x):
        body(x, tasks=x.size, work=1.0)
"""


def use(
    folder: Path, cache: Path | str, *words: str, kernel: str = KERNEL
) -> subprocess.CompletedProcess[str]:
    """Call a small kernel in a new process."""
    (folder / "small.py").write_text(kernel)
    return subprocess.run(
        [sys.executable, "-c", USE, str(folder), *words],
        env=os.environ | {"NUMBA_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )


def test_a_kernel_is_compiled_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert use(tmp_path, cache).stdout == "[1.0, 1.0, 1.0] 0\n"
    again = use(tmp_path, cache)
    assert again.stdout == "[1.0, 1.0, 1.0] 1\n"
    assert again.stderr == ""


@pytest.mark.parametrize(
    ("kernel", "before", "after"),
    [
        (KERNEL, "+= 1", "+= 2"),
        (PARALLEL, "+= amount(x)", "+= 2 * amount(x)"),  # the loop around it is in _launch.py
        (PARALLEL, "type(1)", "type(2)"),
    ],
)
def test_only_the_content_of_the_sources_decides(
    tmp_path: Path, kernel: str, before: str, after: str
) -> None:
    """Another folder and another time of change compile nothing; another word does."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    cache = tmp_path / "cache"
    use(first, cache, kernel=kernel)
    os.utime(first / "small.py", (1, 1))
    assert use(second, cache, kernel=kernel).stdout == "[1.0, 1.0, 1.0] 1\n"
    changed = kernel.replace(before, after)
    assert use(second, cache, kernel=changed).stdout == "[2.0, 2.0, 2.0] 0\n"
    # the first code is still there
    assert use(first, cache, kernel=kernel).stdout == "[1.0, 1.0, 1.0] 1\n"


def test_kernels_of_old_versions_are_removed_when_others_are_kept(tmp_path: Path) -> None:
    """Only folders of kernels that nothing has used for long; using one keeps it."""
    cache, day = tmp_path / "cache", 86_400
    use(tmp_path, cache)
    (own,) = cache.iterdir()
    names = ("mmrec-0123456789abcdef", "mmrec-fedcba9876543210", "mmrec-notes", "other")
    old, recent, notes, other = (cache / name for name in names)
    for folder in (old, recent, notes, other):
        folder.mkdir()
        (folder / "file").touch()
    now = time.time()
    for folder in (own, old, notes, other):
        os.utime(folder, (now, now - (_jit.UNUSED_DAYS + 1) * day))
    os.utime(recent, (now, now - (_jit.UNUSED_DAYS - 1) * day))
    use(tmp_path, cache)  # what is there suffices: nothing is kept, and nothing removed
    assert old.exists()
    assert now - own.stat().st_mtime < day
    use(tmp_path, cache, kernel=KERNEL.replace("+= 1", "+= 2"))
    assert not old.exists()
    assert all((folder / "file").exists() for folder in (recent, notes, other))
    assert [*own.glob("*.nbc")]


def test_a_kernel_is_kept_with_the_sources_of_its_module() -> None:
    """The loop of every parallel kernel has its code in _launch.py, and must not be kept there."""
    for path in sorted(Path(_jit.__file__).parent.glob("*/kernel.py")):
        module = importlib.import_module(f"mmrec.kernels.{path.parent.name}.kernel")
        for kernel in vars(module).values():
            if isinstance(kernel, ParallelKernel):
                assert kernel.loop._cache.cache_path == _jit._cache_folder_of(str(path))  # type: ignore[attr-defined]


def compiled_files() -> list[Path]:
    """The files of the package that have compiled functions."""
    files = sorted(Path(_jit.__file__).parent.rglob("*.py"))
    return [p for p in files if re.search("import .*(compiled_kernel|inline_jit)", p.read_text())]


@pytest.mark.parametrize("path", compiled_files(), ids=lambda path: "/".join(path.parts[-2:]))
def test_the_digest_has_all_that_a_kernel_is_made_of(path: Path) -> None:
    """What a file with compiled functions imports of mmrec is followed by the digest."""
    found: set[Path] = set()
    _jit._sources(path, found)
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.partition(".")[0] == "mmrec":
                module = sys.modules.get(name) or importlib.import_module(name)
                assert Path(str(module.__file__)) in found, f"{name} is not in the digest"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    """The system says that root may write in /proc, and then refuses each file."""
    assert use(tmp_path, "/proc").stdout == "[1.0, 1.0, 1.0] 0\n"
    assert use(tmp_path, "/dev/null/cache").stdout == "[1.0, 1.0, 1.0] 0\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of POSIX")
def test_a_full_disk_is_no_error(tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk without room."""
    run = use(tmp_path, tmp_path / "cache", "100")
    assert run.stdout == "[1.0, 1.0, 1.0] 0\n"
    assert run.stderr.count("\n") == 1
    assert "cannot be kept" in run.stderr
    assert not [*(tmp_path / "cache").rglob("*.nbc")]


def double(x: np.ndarray) -> None:
    for i in range(x.size):
        x[i] *= 2


def test_one_process_compiles_and_the_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two caches of one function lock each other out, as those of two processes do."""
    monkeypatch.setattr(_jit, "CACHE_FOLDER", tmp_path)
    _jit._cache_folder_of.cache_clear()
    try:
        kernel, other = compiled_kernel(double), compiled_kernel(double)
        own, others = kernel._cache, other._cache  # type: ignore[attr-defined]
    finally:
        _jit._cache_folder_of.cache_clear()
    assert isinstance(own, SharedCache)
    signature = (kernel.typeof_pyval(np.ones(2)),)  # type: ignore[attr-defined]
    context = kernel.targetctx  # type: ignore[attr-defined]
    assert own.load_overload(signature, context) is None
    assert others.is_being_compiled()
    monkeypatch.setattr(SharedCache, "PATIENCE", 0.01)
    assert others.load_overload(signature, context) is None  # it does not wait for ever
    kernel(np.ones(2))
    assert not others.is_being_compiled()
    assert others.holds(signature, context)
    other(np.ones(2))
    assert sum(other.stats.cache_hits.values()) == 1  # type: ignore[attr-defined]


def test_calls_are_noted_and_compute_nothing() -> None:
    def fill(x: np.ndarray, value: float) -> None:
        x[:] = value

    kernel, x = compiled_kernel(fill), np.zeros(2)
    with record_calls() as calls:
        kernel(x, 1.0)
        kernel(x, 2.0)
        kernel(x.astype(np.float32), 2.0)
    assert x.tolist() == [0, 0]
    assert [str(call.types[0].dtype) for call in calls.values()] == ["float64", "float32"]
    kernel(x, 1.0)
    assert x.tolist() == [1, 1]
