"""Memory of training and generation: measured, and as 'mmrec info' estimates it.

    python benchmarks/memory_use.py input.txt [--presets tiny mini] [--seq-len T] [--batch-size B]

Each case is the command as a user runs it: a few steps of training with validation and checkpoints,
or a prompt of some 3,000 tokens and 64 generated tokens. The peak memory of the process is compared
with the total of 'mmrec info'. An earlier run compiles the kernels and tokenises the text. Writes
results/memory_use.json, where earlier cases stay.
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

from mmrec.profiling.kernel_bench import describe_machine

RESULTS = Path(__file__).parent / "results" / "memory_use.json"
PRESETS = ["tiny", "mini", "small", "base"]
VOCAB = "5000"
KEYS = ("preset", "what", "precision", "batch_size", "seq_len")


def peak(*words: str) -> int:
    """Run the command; return its largest resident memory in bytes."""
    command = [sys.executable, "-m", "mmrec", *words]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            output.seek(0)
            raise SystemExit(output.read().decode())
    return 1024 * usage.ru_maxrss


def case(
    run: Path, text: Path, name: str, what: str, precision: str, size: dict[str, int]
) -> dict[str, Any]:
    """Measure one case: training, or generation by the run that was trained before."""
    options = [w for k, v in size.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    info = ["info", name, "--json", "--vocab", VOCAB, "--precision", precision, *options]
    info += ["--replicas", "threads"]  # one process is measured
    estimate = json.loads(mmrec(*info))["bytes"][what]
    if what == "generation":
        prompt = text.read_text()[:10_000]
        measured = peak("generate", "--model", str(run), "--prompt", prompt, "--max-tokens", "64")
    else:
        extra = ["--activation-checkpointing"] if what == "activation_checkpointing" else []
        measured = peak(
            "train",
            name,
            "--data",
            str(text),
            "--vocab",
            VOCAB,
            "--steps",
            "2",
            "--replicas",
            "threads",
            "--precision",
            precision,
            *options,
            *extra,
            "--out",
            str(run),
            "--force",
        )
    row = dict(zip(KEYS, (name, what, precision, *size.values()), strict=True))
    ratio = round(estimate["total"] / measured, 3)
    return row | {
        "measured": measured,
        "counted": estimate["total"],
        "ratio": ratio,
        "parts": estimate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    # generation comes last: it uses the model that the case before has trained
    cases = ["training", "activation_checkpointing", "generation"]
    parser.add_argument("--what", nargs="+", choices=cases, default=cases)
    parser.add_argument("--precision", nargs="+", default=["bfloat16", "float32"])
    args = parser.parse_args()
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    size = {"batch_size": args.batch_size, "seq_len": args.seq_len}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        for precision in args.precision:
            case(run, args.text, "tiny", "training", precision, size)
        for name in args.presets:
            for what in args.what:
                for precision in args.precision if what != "generation" else ["float32"]:
                    row = case(run, args.text, name, what, precision, size)
                    print({k: v for k, v in row.items() if k != "parts"}, flush=True)
                    rows = [r for r in rows if any(r[k] != row[k] for k in KEYS)] + [row]
                    result = {"machine": describe_machine(), "rows": rows}
                    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
