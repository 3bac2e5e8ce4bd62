"""The whole package on a platform that lacks what only POSIX or Linux has.

One process hides those modules and names from mmrec, then imports every module, and trains,
evaluates and generates as the command line does.
"""

import subprocess
import sys
from pathlib import Path

HIDE = """
import ctypes, mmap, os, pkgutil, signal, sys
# libraries may need what they like: they are loaded first
import datasets, filelock, h5py, lm_eval.api.model, lm_eval.api.registry, matplotlib.figure
import numba, numpy, platformdirs, pyarrow.parquet, scipy.stats, tokenizers, torch, tqdm, typer
import torch.distributed.fsdp, torch.utils.checkpoint
for name in ("fcntl", "resource", "pwd", "grp", "pty", "termios"):
    sys.modules[name] = None
for module, names in (
    (signal, ("SIGHUP", "SIGKILL", "SIGXFSZ", "SIGUSR1", "SIGPIPE", "pthread_kill")),
    (mmap, ("MADV_HUGEPAGE",)),
    (os, ("sched_getaffinity", "getuid", "geteuid", "fork", "killpg", "register_at_fork")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
ctypes.CDLL = None
real_open = os.open
def open_files_only(path, *arguments, **options):
    if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return real_open(path, *arguments, **options)
os.open = open_files_only
"""
IMPORT_ALL = """
import mmrec.cli, mmrec.data
for package in (mmrec, mmrec.cli, mmrec.data):
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        # transformers itself imports the modelling code, which needs transformers
        if not found.name.endswith(("__main__", "export.modeling_mmrec", "configuration_mmrec")):
            __import__(found.name)
count = sum(name.startswith("mmrec.") for name in sys.modules)
assert count > 90, count
"""
RUN = """
from mmrec.cli import main
def run(arguments):
    sys.argv = ["mmrec", *arguments.split()]
    try:
        main.run()
    except SystemExit as error:
        assert not error.code, (arguments, error.code)
run("train tiny --data text.txt --tokenizer byte --steps 4 --batch-size 2 --seq-len 32 "
    "--eval-every 2 --save-every 2 --out run")
run("train --resume --out run --steps 6")
run("status run")
run("eval run")
run("generate --model run --prompt def --max-tokens 5 --seed 1")
"""


def test_nothing_needs_a_posix_system(tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "text.txt").write_text(text_file.read_text())
    command = [sys.executable, "-c", HIDE + IMPORT_ALL + RUN]
    process = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "trained 384 tokens" in process.stdout
    assert "bits per byte" in process.stdout
    assert "\ndef" in process.stdout
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"best.h5", "last.h5", "step-4.h5", "loss.png", "summary.json"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
