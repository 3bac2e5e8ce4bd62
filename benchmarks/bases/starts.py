"""A new model or a pretrained one, for how much text of which kind? Decides ``mmrec train auto``.

    python benchmarks/bases/starts.py --work WORK --texts CORPORA --german CLONE
    python benchmarks/bases/starts.py --work WORK --kinds code --sizes 100000 --minutes 3 --add

For each kind of text, size, time and seed: train a new model as ``auto --from-scratch`` does, and
go on from each pretrained model as ``auto`` does where it begins from one, each on one core. The
texts are documents that no pretrained model has read: the held-out books and packages of WORK (see
bases.py), web pages of CORPORA, and German novels from a clone of GERMAN_URL. Each model is scored
on the validation split of its text, as ``mmrec eval`` does, and on other documents of the kind.

Writes results/starts.json and starts.png. A cell that is there is not run again with ``--add``.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from books import git

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks
from outputs import add_add, add_force, check_results
from text_files import read_documents

GERMAN_URL = "https://github.com/computationalstylistics/68_german_novels"
GERMAN_COMMIT = "4cc71e1d44647244b3df29474180a8a5e4fe8290"
KINDS = ("fiction", "web pages", "code", "German")
SIZES = (20_000, 100_000, 500_000, 1_000_000, 2_000_000, 10_000_000)
"""Bytes of text. A kind that has not so much is left out there."""
NEW = "a new model"
OTHER_BYTES, OTHER_DOCUMENT_BYTES = 150_000, 30_000
"""Size of the other documents on which a model is scored, and the most of each of them."""
RESULTS = Path(__file__).parents[1] / "results" / "starts.json"
PICTURE = RESULTS.with_suffix(".png")


@dataclass(frozen=True)
class Cell:
    """One training."""

    kind: str
    bytes: int
    minutes: float
    start: str
    """NEW, or the name of a pretrained model."""
    seed: int


# ---- texts


def documents(kind: str, args: argparse.Namespace) -> list[str]:
    """Return the documents of a kind, in an order that their hashes draw."""
    if kind == "German":
        names = git(args.german, "ls-tree", "-r", "-z", "--name-only", GERMAN_COMMIT).decode()
        texts = [
            git(args.german, "show", f"{GERMAN_COMMIT}:{name}").decode()
            for name in names.split("\0")
            if name.endswith(".txt")
        ]
    else:
        path: Path = {
            "fiction": args.work / "books" / "held-out.jsonl",
            "code": args.work / "code" / "held-out.jsonl",
            "web pages": args.texts / "c4_sample" / "c4_sample.jsonl",
        }[kind]
        texts = list(read_documents(path))
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


def beginnings(texts: Sequence[str], size: int, most: int) -> Iterator[str]:
    """Yield beginnings of documents, ``most`` bytes at most, until there are ``size`` bytes."""
    for text in texts:
        if size <= 0:
            return
        part = text.encode()[: min(size, most)].decode("utf-8", "ignore")
        size -= len(part.encode())
        yield part


def write_texts(kind: str, args: argparse.Namespace, folder: Path) -> tuple[dict[int, Path], Path]:
    """Write the texts of a kind as JSON lines.

    Returns:
        The text of each size, and the other documents.
    """
    texts = documents(kind, args)

    def write(name: str, parts: Iterator[str]) -> Path:
        path = folder / f"{name}.jsonl"
        lines = (json.dumps({"text": part}, ensure_ascii=False) + "\n" for part in parts)
        path.write_text("".join(lines), "utf-8")
        return path

    others = list(beginnings(texts[::-1], OTHER_BYTES, OTHER_DOCUMENT_BYTES))
    other = write(f"{kind}-other", iter(others))
    texts = texts[: len(texts) - len(others)]
    available = sum(len(text.encode()) for text in texts)
    sizes = [size for size in args.sizes if size <= 1.1 * available]
    return {n: write(f"{kind}-{n}", beginnings(texts, n, n)) for n in sizes}, other


# ---- one cell, in a process of its own


def train_and_score(cell: Cell, text: Path, other: Path) -> dict[str, Any]:
    """Train as ``auto`` does with this start, and score the best model."""
    import mmrec
    from mmrec.errors import InputError
    from mmrec.pretrained import pretrained_models
    from mmrec.training import auto
    from mmrec.training.pretrained import Candidate

    if cell.start != NEW:  # whatever the rule says
        auto.MAX_BITS_PER_BYTE = math.inf
        auto.MAX_PRETRAINED_TOKENS = sys.maxsize
        candidate = Candidate(pretrained_models()[cell.start], 0.0)
        auto.score_candidates = lambda *_: [candidate]
    with tempfile.TemporaryDirectory() as folder:
        trained = mmrec.train(
            text,
            "auto",
            out=folder,
            minutes=cell.minutes,
            seed=cell.seed,
            from_scratch=cell.start == NEW,
            sample_tokens=0,
            force=True,
            progress=False,
        )
        best = mmrec.load(folder)
        own, found = mmrec.evaluate(best), None
    with contextlib.suppress(InputError):  # a character that a model of characters has not seen
        found = mmrec.evaluate(best, other).bits_per_byte
    return dataclasses.asdict(cell) | {
        "bits_per_byte": own.bits_per_byte,
        "other_bits_per_byte": found,
        "tokens": trained.summary["tokens"],
        "seconds": trained.summary["seconds"],
        "best_step": best.step,
        "steps": trained.summary["steps"],
        "tokenizer": best.tokenizer.kind,
    }


def rule(text: Path, minutes: float) -> dict[str, Any]:
    """What ``auto`` chooses on one core, and the bits per byte that it decides by."""
    from mmrec.config import DataConfig
    from mmrec.training.auto import choose_for

    choice = choose_for(DataConfig(source=str(text)), {"minutes": minutes})
    return {
        "auto": choice.settings.get("initialize_from", NEW),
        "before": {c.model.name: round(c.bits_per_byte, 4) for c in choice.candidates},
    }


# ---- all cells


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table in Markdown: mean bits per byte by text and start, and what auto chooses."""
    starts = list(dict.fromkeys(row["start"] for row in rows))
    lines = ["| text | minutes | " + " | ".join(starts) + " | auto | better |"]
    lines += ["|" + "---|" * (len(starts) + 4)]
    right = compared = 0
    cells = group(rows)
    for (kind, size, minutes), found in cells.items():
        means = {start: sum(v) / len(v) for start, v in found["bits"].items()}
        better = min(means, key=means.__getitem__) if len(means) > 1 else ""
        compared += len(means) > 1
        right += found["auto"] == better
        figures = (f"{means[start]:.3f}" if start in means else "" for start in starts)
        lines.append(
            f"| {size / 1000:,.0f} kB of {kind} | {minutes:g} | {' | '.join(figures)} | "
            f"{found['auto']} | {better} |"
        )
    return "\n".join([*lines, "", f"auto chooses the better start in {right} of {compared}"])


def group(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int, float], dict[str, Any]]:
    """Return, by kind, size and time: bits per byte of each start, and what auto chooses."""
    cells: dict[tuple[str, int, float], dict[str, Any]] = {}
    order = sorted(rows, key=lambda r: (KINDS.index(r["kind"]), r["minutes"], r["bytes"]))
    for row in order:
        key = (row["kind"], row["bytes"], row["minutes"])
        cell = cells.setdefault(key, {"auto": row["auto"], "bits": {}})
        cell["bits"].setdefault(row["start"], []).append(row["bits_per_byte"])
    return cells


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw bits per byte against the size of the text: a panel per kind of text."""
    import matplotlib.pyplot as plt

    cells = group(rows)
    kinds = list(dict.fromkeys(kind for kind, _, _ in cells))
    times = sorted({minutes for _, _, minutes in cells})
    starts = list(dict.fromkeys(row["start"] for row in rows))
    figure, axes = plt.subplots(
        1,
        len(kinds),
        figsize=(3 * len(kinds), 3.6),
        squeeze=False,
        layout="constrained",
        sharey=True,
    )
    lines = {}
    for axis, kind in zip(axes[0], kinds, strict=True):
        for number, start in enumerate(starts):
            for minutes, style in zip(times, ("o-", "s--", "^:"), strict=False):
                points = [
                    (n, sum(cell["bits"][start]) / len(cell["bits"][start]))
                    for (k, n, m), cell in cells.items()
                    if (k, m) == (kind, minutes) and start in cell["bits"]
                ]
                if points:
                    label = f"{start}, {minutes:g} minutes"
                    [lines[label]] = axis.plot(
                        *zip(*points, strict=True), style, color=f"C{number}", label=label
                    )
        axis.set(xscale="log", xlabel="bytes of text", title=kind)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("bits per byte of the validation split")
    figure.legend(
        lines.values(),
        lines,
        loc="outside lower center",
        ncols=len(lines),
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run_cell(
    cell: Cell, text: Path, other: Path, cores: "queue.Queue[int]", folder: Path
) -> dict[str, Any]:
    """Run a cell in a process of its own, on a core that no other cell has.

    Raises:
        RuntimeError: it failed.
    """
    core = cores.get()
    try:
        command = [sys.executable, __file__, "--cell", json.dumps(dataclasses.asdict(cell))]
        command += ["--cell-core", str(core), "--cell-texts", str(text), str(other)]
        process = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            env=os.environ | {"MMREC_CACHE": str(folder / f"cache-{core}")},
            check=False,
        )
    finally:
        cores.put(core)
    if process.returncode:
        raise RuntimeError(f"{cell} failed:\n{process.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    work = Path("runs", "pretrained")
    parser.add_argument("--work", type=Path, default=work, help=f"folder of bases.py ({work})")
    parser.add_argument("--texts", type=Path, default=Path(), help="folder of the web pages")
    parser.add_argument("--german", type=Path, default=Path(), help="a clone of the novels")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES)
    parser.add_argument("--minutes", nargs="*", type=float, default=(3.0, 15.0))
    parser.add_argument("--seeds", nargs="*", type=int, default=(0, 1, 2))
    parser.add_argument("--starts", nargs="*", help="by default a new model and all pretrained")
    parser.add_argument("--cores", nargs="*", type=int, default=(0,), help="a cell on each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--cell-core", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cell-texts", nargs=2, type=Path, help=argparse.SUPPRESS)
    add_add(parser)
    add_force(parser)
    args = parser.parse_args()
    if args.cell:
        os.sched_setaffinity(0, {args.cell_core})  # before torch counts them
        cell, (text, other) = Cell(**json.loads(args.cell)), args.cell_texts
        print(json.dumps(rule(text, cell.minutes) | train_and_score(cell, text, other)))
        return
    check_results(parser, args, args.out, args.out.with_suffix(".png"))

    from mmrec.errors import InputError
    from mmrec.pretrained import pretrained_models
    from mmrec.profiling.kernel_bench import describe_machine

    rows = json.loads(args.out.read_text("utf-8"))["rows"] if args.add and args.out.exists() else []
    names = {f.name for f in dataclasses.fields(Cell)}
    done = {Cell(**{k: row[k] for k in names}) for row in rows}
    cores: queue.Queue[int] = queue.Queue()
    for core in args.cores:
        cores.put(core)
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(len(args.cores)) as pool,
    ):
        waiting = []
        for kind in args.kinds:
            try:
                paths, other = write_texts(kind, args, Path(folder))
            except (InputError, subprocess.CalledProcessError) as error:
                parser.error(f"the texts of the kind {kind} must be there: {error}")
            cells = [
                Cell(kind, size, minutes, start, seed)
                for seed in args.seeds
                for minutes in args.minutes
                for size in paths
                for start in args.starts or (NEW, *pretrained_models())
            ]
            waiting += [
                pool.submit(run_cell, cell, paths[cell.bytes], other, cores, Path(folder))
                for cell in cells
                if cell not in done
            ]
        for future in waiting:
            row = future.result()
            rows.append(row)
            print(json.dumps(row), flush=True)
            result = {"machine": describe_machine(), "rows": rows}
            args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
            draw(rows, args.out.with_suffix(".png"))
    print(show(rows))


if __name__ == "__main__":
    main()
