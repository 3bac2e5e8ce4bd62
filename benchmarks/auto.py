"""What ``mmrec train auto`` rests on: characters or BPE, and how often a small text may be read.

    python benchmarks/auto.py input.txt --max-bytes 300000 --tokenizer char --flops 8e12
    python benchmarks/auto.py input.txt --max-bytes 170000 --tokenizer char --epochs 32 --width 64

One run of tiny per call, scored on the whole validation split at its end. Its length is a number of
epochs, or of floating-point operations, which stand for time: runs of equal operations are compared
on a machine that is busy with other things. Adds to results/auto.json with ``--add``.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

from outputs import add_add, add_force, check_results, write_runs

import mmrec
from mmrec.config import preset, preset_train_settings
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import prepare
from mmrec.data.readers import ReadOptions
from mmrec.model import flops_per_token
from mmrec.profiling.kernel_bench import describe_machine

RESULTS = Path(__file__).parent / "results" / "auto.json"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="the text")
    parser.add_argument("--max-bytes", type=int, default=0, help="bytes of it; 0: all")
    parser.add_argument("--tokenizer", default="char", choices=("bpe", "char"))
    parser.add_argument("--vocab", type=int, default=5000)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--flops", type=float, help="operations of the run")
    length.add_argument("--epochs", type=float)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--width", type=int, default=128, help="of the model; heads are 32 wide")
    parser.add_argument("--seed", type=int, default=0)
    add_add(parser)
    add_force(parser)
    args = parser.parse_args()
    check_results(parser, args, RESULTS)
    options = ReadOptions(max_bytes=args.max_bytes)
    corpus = Corpus.open(prepare(args.data, args.tokenizer, args.vocab, None, print, options))
    shape = {"width": args.width, "heads": args.width // 32, "ngram_buckets": 32 * args.width}
    if args.tokenizer == "char":
        shape["ngram_buckets"] *= 2
    model = dataclasses.replace(
        preset("tiny", args.tokenizer), vocab_size=corpus.tokenizer.vocab_size, **shape
    )
    epochs = args.epochs
    if args.flops:
        epochs = args.flops / flops_per_token(model)["training"] / corpus.train.n_tokens
    with tempfile.TemporaryDirectory() as folder:
        run = mmrec.train(
            corpus.path,
            "tiny",
            out=folder,
            force=True,
            epochs=epochs,
            dropout=args.dropout,
            weight_decay=args.weight_decay,
            seed=args.seed,
            eval_every=10**6,
            save_every=10**6,
            **preset_train_settings("tiny", args.tokenizer),
            **shape,
        )
    scores = run.summary["epochs"][-1]
    settings = {k: v for k, v in vars(args).items() if k not in ("add", "force", "data")}
    result = {
        "machine": describe_machine(),
        "text": Path(args.data).name,
        **settings,
        "epochs": epochs,
        "training_bytes": corpus.train.n_bytes,
        "training_tokens": corpus.train.n_tokens,
        "tokens": run.summary["tokens"],
        "flops": run.summary["tokens"] * flops_per_token(model)["training"],
        "bits_per_byte": scores["bits_per_byte"],
    }
    print({k: v for k, v in result.items() if k != "machine"})
    write_runs(RESULTS, result, add=args.add)


if __name__ == "__main__":
    main()
