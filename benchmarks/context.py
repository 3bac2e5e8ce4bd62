"""Does more context help? The loss on the same tokens, with more and more context before them.

    python benchmarks/context.py runs/window runs/carry [--longest 16384] [--out NAME]

For C = 16, 32, … a document is read in windows of C tokens. Each window starts from the empty
state, half a window after the one before, and its second half is scored. So every token is scored
once, with C/2 to C - 1 tokens of context. The scored tokens are the same for each C: those of the
validation split after the first ``longest`` / 2 tokens of their document. (A mean by position in
the document would compare the beginnings of documents with their middles.) Writes results/NAME.json
and docs/images/NAME.png.
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
from mmrec.evaluation.provenance import training_config
from mmrec.profiling.kernel_bench import describe_machine
from mmrec.runtime.pictures import METADATA

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
CHUNK = 256  # tokens per row and forward pass
BATCH_TOKENS = 1 << 14  # tokens per forward pass


def training_corpus(loaded: LoadedModel) -> Corpus:
    """Open the corpus that a model was trained on."""
    data = training_config(loaded).data
    return open_corpus(data.source, loaded.tokenizer, None, read_options(data))


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
    parser.add_argument("--out", default="context", help="name of the results")
    add_force(parser)
    args = parser.parse_args()
    path, picture = RESULTS / f"{args.out}.json", IMAGES / f"{args.out}.png"
    check_results(parser, args, path, picture)
    rows: list[dict[str, object]] = []
    for run in args.runs:
        loaded = load_model(find_checkpoint(run))
        corpus = training_corpus(loaded)
        documents = long_documents(corpus.val, args.longest)
        losses, context = {}, 16
        while context <= args.longest:
            losses[context] = loss_with(loaded, documents, context, args.longest)
            print(f"{run.name} {context:>7,}: {losses[context]:.4f}", flush=True)
            context *= 2
        rows.append(
            {
                "run": run.name,
                "documents": len(documents),
                "source": corpus.info["source"],
                "tokens": sum(len(d) - 1 - args.longest // 2 for d in documents),
                "nats_per_token": losses,
            }
        )
    RESULTS.mkdir(exist_ok=True)
    result = {"machine": describe_machine(), "longest": args.longest, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, picture, Path(str(rows[0]["source"])).parent.name or "")


if __name__ == "__main__":
    main()
