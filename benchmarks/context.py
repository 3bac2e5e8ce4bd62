"""Does more context help? The loss on the same tokens, with more and more context before them.

    python benchmarks/context.py runs/window runs/carry [--longest 16384] [--out NAME]
    python benchmarks/context.py english --data books.jsonl --neural-cache --out NAME

For C = 16, 32, … a document is read in windows of C tokens. Each window starts from the empty
state, half a window after the one before, and its second half is scored. So every token is scored
once, with C/2 to C - 1 tokens of context. The scored tokens are the same for each C: those of the
validation split after the first ``longest`` / 2 tokens of their document. (A mean by position in
the document would compare the beginnings of documents with their middles.) With ``--neural-cache``
each window is also scored with a neural cache of its C tokens. Writes results/NAME.json and
docs/images/NAME.png.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from outputs import add_force, check_results

from mmrec.checkpoint.checkpoint import LoadedModel, load_model
from mmrec.checkpoint.manager import find_checkpoint
from mmrec.data.corpus import Corpus, Split
from mmrec.data.prepare import open_corpus, read_options
from mmrec.data.readers import ReadOptions
from mmrec.data.sources import iter_documents
from mmrec.evaluation.provenance import training_config
from mmrec.inference.neural_cache import NeuralCache, unit_keys
from mmrec.profiling.kernel_bench import describe_machine
from mmrec.runtime.pictures import METADATA

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
CHUNK = 256  # tokens per row and forward pass
BATCH_TOKENS = 1 << 14  # tokens per forward pass
MOST_TOKENS = 50_000  # of all documents of a text that is given


def training_corpus(loaded: LoadedModel) -> Corpus:
    """Open the corpus that a model was trained on."""
    data = training_config(loaded).data
    return open_corpus(data.source, loaded.tokenizer, None, read_options(data))


def text_documents(loaded: LoadedModel, data: str, longest: int) -> list[np.ndarray]:
    """Return the beginnings of the long documents of a text, each after an end token."""
    eot, found, left = loaded.tokenizer.eot, [], MOST_TOKENS
    for document in iter_documents(data, ReadOptions()):
        tokens = np.concatenate(([eot], loaded.tokenizer.encode(document.text))).astype(np.int64)
        if len(tokens) > longest and left > 0:
            found.append(tokens[: longest + longest // 2])
            left -= longest
    return found


@torch.inference_mode()
def loss_with_cache(
    loaded: LoadedModel, documents: list[np.ndarray], context: int, longest: int
) -> float:
    """Return the loss as ``loss_with`` does, of the model with a neural cache of ``context``."""
    half, nats, count = context // 2, 0.0, 0
    for tokens in documents:
        for at in range(longest // 2, len(tokens) - 1, half):
            x, y = tokens[at - half : at + half], tokens[at - half + 1 : at + half + 1]
            x = x[: len(y)]
            hidden, _ = loaded.model.hidden_states(torch.from_numpy(x)[None])
            keys = unit_keys(hidden[0].numpy())
            cache = NeuralCache(context, keys.shape[1])
            for lo in (*range(0, half, CHUNK), *range(half, len(y), CHUNK)):
                rows = slice(lo, min(lo + CHUNK, half) if lo < half else lo + CHUNK)
                logits = loaded.model.lm_head(hidden[0, rows]).numpy()
                if lo < half:
                    cache.observe(logits, keys[rows], y[rows])
                    continue
                mixed = torch.from_numpy(cache.mix(logits, keys[rows], y[rows]))
                targets = torch.from_numpy(y[rows])
                nats += float(F.cross_entropy(mixed, targets, reduction="sum"))
                count += len(targets)
    assert count == sum(len(tokens) - 1 - longest // 2 for tokens in documents)
    return nats / count


def long_documents(split: Split, longest: int) -> list[np.ndarray]:
    """Return the documents that are long enough, each after the end token of the one before."""
    bounds = zip(split.doc_offsets[:-1], split.doc_offsets[1:], strict=True)
    eot = int(split.tokens[split.doc_offsets[1] - 1])
    return [
        np.concatenate(([eot], split.tokens[lo:hi])).astype(np.int64)
        for lo, hi in bounds
        if hi - lo > longest // 2
    ]


@torch.inference_mode()
def loss_with(
    loaded: LoadedModel, documents: list[np.ndarray], context: int, longest: int
) -> float:
    """Return the mean loss (nats per token) with context / 2 to context - 1 tokens of context."""
    half, nats, count = context // 2, 0.0, 0
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for tokens in documents:
        for at in range(longest // 2, len(tokens) - 1, half):
            x, y = tokens[at - half : at + half], tokens[at - half + 1 : at + half + 1]
            y, x = np.pad(y, (0, context - len(y)), constant_values=-100), x[:context]
            y[:half] = -100
            rows.append((np.pad(x, (0, context - len(x))), y))
    size = max(1, BATCH_TOKENS // min(context, CHUNK))
    for lo in range(0, len(rows), size):
        inputs, targets = (
            torch.from_numpy(np.stack(arrays)) for arrays in zip(*rows[lo : lo + size], strict=True)
        )
        state = None
        for x, y in zip(inputs.split(CHUNK, 1), targets.split(CHUNK, 1), strict=True):
            hidden, state = loaded.model.hidden_states(x, state)
            is_scored = y >= 0
            pairs = zip(hidden[is_scored].split(4096), y[is_scored].split(4096), strict=True)
            for h, target in pairs:
                nats += float(F.cross_entropy(loaded.model.lm_head(h), target, reduction="sum"))
            count += int(is_scored.sum())
    assert count == sum(len(tokens) - 1 - longest // 2 for tokens in documents)
    return nats / count


def draw(rows: list[dict[str, object]], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        losses = row["nats_per_token"]
        assert isinstance(losses, dict)
        axes.plot([int(c) for c in losses], [*losses.values()], "o-", label=str(row["run"]))
    axes.set(
        xscale="log",
        title=title,
        ylabel="loss (nats/token), on the same tokens",
        xlabel="context (tokens); a scored token has at least half of it",
    )
    ticks = [int(c) for c in losses]
    axes.set_xticks(ticks, [f"{c:,}" for c in ticks], fontsize=8)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata=METADATA)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument(
        "--longest", type=int, default=16384, help="longest context, a power of two"
    )
    parser.add_argument("--data", help="a text to score instead of the validation split")
    parser.add_argument("--neural-cache", action="store_true", help="also with a neural cache")
    parser.add_argument("--out", default="context", help="name of the results")
    add_force(parser)
    args = parser.parse_args()
    path, picture = RESULTS / f"{args.out}.json", IMAGES / f"{args.out}.png"
    check_results(parser, args, path, picture)
    rows: list[dict[str, object]] = []
    for run in args.runs:
        loaded = load_model(find_checkpoint(run))
        if args.data:
            source, documents = args.data, text_documents(loaded, args.data, args.longest)
        else:
            corpus = training_corpus(loaded)
            source = str(corpus.info["source"])
            documents = long_documents(corpus.val, args.longest)
        if not documents:
            parser.error(f"no document of {source} is longer than {args.longest:,} tokens")
        scores = {run.name: loss_with}
        if args.neural_cache:
            scores[f"{run.name}, neural cache"] = loss_with_cache
        for name, score in scores.items():
            losses, context = {}, 16
            while context <= args.longest:
                losses[context] = score(loaded, documents, context, args.longest)
                print(f"{name} {context:>7,}: {losses[context]:.4f}", flush=True)
                context *= 2
            rows.append(
                {
                    "run": name,
                    "documents": len(documents),
                    "source": "/".join(Path(source).parts[-2:]),
                    "tokens": sum(len(d) - 1 - args.longest // 2 for d in documents),
                    "nats_per_token": losses,
                }
            )
    RESULTS.mkdir(exist_ok=True)
    result = {"machine": describe_machine(), "longest": args.longest, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, picture, str(rows[0]["source"]))


if __name__ == "__main__":
    main()
