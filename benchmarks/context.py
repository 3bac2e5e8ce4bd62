"""Does more context help? The loss on the same tokens, with more and more of what precedes them.

    python benchmarks/context.py runs/window runs/carry [--longest 16384] [--out NAME]

For C = 16, 32 … a document is read in windows of C tokens, each from an empty state and half a
window after the last, and the second half of each is scored: every token is scored once, with C/2
to C - 1 tokens known. The tokens are the same for each C: those of the validation split behind the
first ``longest`` / 2 tokens of their document. A mean by place in the document would compare the
beginnings of documents with their middles. Writes results/NAME.json and docs/NAME.png.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mmrec.checkpoint.checkpoint import LoadedModel, load_model
from mmrec.checkpoint.manager import find_checkpoint
from mmrec.config import TrainConfig, from_dict
from mmrec.data.corpus import Corpus, Split
from mmrec.data.prepare import open_corpus, reading
from mmrec.profiling.kernel_bench import machine

RESULTS, DOCS = (Path(__file__).parent / "results", Path(__file__).parent.parent / "docs")
CHUNK = 256  # tokens of a row that are read at once
TOKENS = 1 << 14  # of all rows that are read side by side


def validation(loaded: LoadedModel) -> Corpus:
    """The corpus that a model was trained on."""
    settings: TrainConfig = from_dict(TrainConfig, loaded.metadata["train"])
    return open_corpus(settings.data, loaded.tokenizer, None, reading(settings))


def texts(split: Split, longest: int) -> list[np.ndarray]:
    """Documents that are long enough, each behind the end token of the one before it."""
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
    """Mean nats of the tokens behind ``longest`` / 2, each knowing context / 2 to context - 1."""
    half, total, count = context // 2, 0.0, 0
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for text in documents:
        for at in range(longest // 2, len(text) - 1, half):
            x, y = text[at - half : at + half], text[at - half + 1 : at + half + 1]
            y, x = np.pad(y, (0, context - len(y)), constant_values=-100), x[:context]
            y[:half] = -100
            rows.append((np.pad(x, (0, context - len(x))), y))
    size = max(1, TOKENS // min(context, CHUNK))
    for lo in range(0, len(rows), size):
        xs, ys = (torch.from_numpy(np.stack(z)) for z in zip(*rows[lo : lo + size], strict=True))
        state = None
        for x, y in zip(xs.split(CHUNK, 1), ys.split(CHUNK, 1), strict=True):
            hidden, state = loaded.model.hidden_states(x, state)
            scored = y >= 0
            for h, target in zip(hidden[scored].split(4096), y[scored].split(4096), strict=True):
                total += float(F.cross_entropy(loaded.model.lm_head(h), target, reduction="sum"))
            count += int(scored.sum())
    assert count == sum(len(text) - 1 - longest // 2 for text in documents)
    return total / count


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
        xlabel="tokens known: half of it at least",
    )
    ticks = [int(c) for c in losses]
    axes.set_xticks(ticks, [f"{c:,}" for c in ticks], fontsize=8)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--longest", type=int, default=16384, help="context, a power of two")
    parser.add_argument("--out", default="context", help="name of the results")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for run in args.runs:
        loaded = load_model(find_checkpoint(run))
        corpus = validation(loaded)
        documents = texts(corpus.val, args.longest)
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
    made = {"machine": machine(), "longest": args.longest, "rows": rows}
    (RESULTS / f"{args.out}.json").write_text(json.dumps(made, indent=1) + "\n")
    draw(rows, DOCS / f"{args.out}.png", Path(str(rows[0]["source"])).parent.name or "")


if __name__ == "__main__":
    main()
