"""What training and generation take in memory, measured, beside what 'mmrec info' says.

    python benchmarks/memory_use.py input.txt [--presets tiny mini] [--seq-len T] [--batch B]

Each case is the command as a user runs it: a few steps of training with its validation and
checkpoints, or a prompt of some 3,000 tokens and 64 more. What the system says the process took at
most is compared with the total of 'mmrec info'. Kernels are compiled and the text tokenised by a
run before. Writes results/memory_use.json, where cases measured earlier stay.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from perplexity import mmrec

from mmrec.profiling.kernel_bench import machine

RESULTS = Path(__file__).parent / "results" / "memory_use.json"
PRESETS = ["tiny", "mini", "small", "base"]
VOCAB = "5000"
KEYS = ("preset", "what", "precision", "batch", "seq_len")


def peak(*words: str) -> int:
    """Run the command; the bytes that it had resident at most."""
    command = [sys.executable, "-m", "mmrec", *words]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            said.seek(0)
            raise SystemExit(said.read().decode())
    return 1024 * usage.ru_maxrss


def case(
    run: Path, text: Path, name: str, what: str, precision: str, size: dict[str, int]
) -> dict[str, Any]:
    """One measurement: a run, or what it generates."""
    options = [w for k, v in size.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    told = ["info", name, "--json", "--vocab", VOCAB, "--precision", precision, *options]
    counted = json.loads(mmrec(*told))["bytes"][what]
    if what == "generation":
        prompt = text.read_text()[:10_000]
        measured = peak("generate", "--model", str(run), "--prompt", prompt, "--max-tokens", "64")
    else:
        again = ["--recompute"] if what == "recompute" else []
        measured = peak(
            "train",
            name,
            "--data",
            str(text),
            "--vocab",
            VOCAB,
            "--steps",
            "2",
            "--precision",
            precision,
            *options,
            *again,
            "--out",
            str(run),
            "--force",
        )
    row = dict(zip(KEYS, (name, what, precision, *size.values()), strict=True))
    ratio = round(counted["total"] / measured, 3)
    return row | {
        "measured": measured,
        "counted": counted["total"],
        "ratio": ratio,
        "parts": counted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    # generation last: it reads what the case before it has trained
    parser.add_argument("--what", nargs="+", default=["training", "recompute", "generation"])
    parser.add_argument("--precision", nargs="+", default=["bfloat16", "float32"])
    given = parser.parse_args()
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    size = {"batch": given.batch, "seq_len": given.seq_len}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        for precision in given.precision:
            case(run, given.text, "tiny", "training", precision, size)
        for name in given.presets:
            for what in given.what:
                for precision in given.precision if what != "generation" else ["float32"]:
                    row = case(run, given.text, name, what, precision, size)
                    print({k: v for k, v in row.items() if k != "parts"}, flush=True)
                    rows = [r for r in rows if any(r[k] != row[k] for k in KEYS)] + [row]
                    made = {"machine": machine(), "rows": rows}
                    RESULTS.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
