"""What a neural cache brings: bits per byte by its size, beside dynamic evaluation.

    python benchmarks/neural_cache.py english=books.jsonl python=code.jsonl runs/tiny-book=rest.txt

Each pair is a model and a text that it has not read. The first ``--bytes`` of the text are scored:
by the model alone, with a neural cache of each of ``--sizes`` tokens, and by ``--adapt``. Every
token is predicted from those before it. Writes results/neural_cache.json; ``--add`` keeps the rows
of other pairs.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from outputs import add_add, add_force, check_results

import mmrec
from mmrec.data.readers import ReadOptions
from mmrec.data.sources import iter_documents
from mmrec.profiling.kernel_bench import describe_machine

RESULTS = Path(__file__).parent / "results" / "neural_cache.json"


def beginning(path: Path, size: int, folder: Path) -> Path:
    """Write the first ``size`` bytes of a text as JSON lines, a document a line."""
    lines = []
    for document in iter_documents(str(path), ReadOptions()):
        part = document.text.encode()[:size].decode("utf-8", "ignore")
        size -= len(part.encode())
        lines.append(json.dumps({"text": part}, ensure_ascii=False) + "\n")
        if size <= 0:
            break
    target = folder / f"{path.stem}.jsonl"
    target.write_text("".join(lines), "utf-8")
    return target


def measure(model: str, path: Path, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Score one text in every way."""
    loaded, text = mmrec.load(model), beginning(path, args.bytes, folder)
    scores = mmrec.evaluate(loaded, text, adapt=True)
    assert scores.dynamic is not None
    row: dict[str, Any] = {
        "model": Path(model).name,
        "text": "/".join(path.parts[-2:]),
        "bytes": scores.bytes,
        "tokens": scores.tokens,
        "bits_per_byte": {"0": scores.bits_per_byte},
        "seconds": {"0": scores.seconds},
        "adapt": scores.dynamic.bits_per_byte,
        "adapt_seconds": scores.dynamic.seconds,
    }
    for size in args.sizes:
        cached = mmrec.evaluate(loaded, text, neural_cache=size).cached
        assert cached is not None
        row["bits_per_byte"][str(size)] = cached.bits_per_byte
        row["seconds"][str(size)] = cached.seconds
    return row


def show(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    sizes = list(rows[0]["bits_per_byte"])
    head = ["model", "text", *(f"{int(size):,}" for size in sizes), "--adapt"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        figures = [*row["bits_per_byte"].values(), row["adapt"]]
        cells = [row["model"], row["text"], *(f"{x:.3f}" for x in figures)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pairs", nargs="+", metavar="MODEL=TEXT")
    parser.add_argument("--sizes", nargs="*", type=int, default=(512, 4096, 32768))
    parser.add_argument("--bytes", type=int, default=150_000, help="of each text")
    add_add(parser)
    add_force(parser)
    args = parser.parse_args()
    check_results(parser, args, RESULTS)
    rows = json.loads(RESULTS.read_text("utf-8"))["rows"] if args.add and RESULTS.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for pair in args.pairs:
            model, _, text = pair.partition("=")
            row = measure(model, Path(text), args, Path(folder))
            key = row["model"], row["text"]
            rows = [r for r in rows if (r["model"], r["text"]) != key] + [row]
            print(json.dumps(row), flush=True)
            result = {"machine": describe_machine(), "rows": rows}
            RESULTS.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(show(rows))


if __name__ == "__main__":
    main()
