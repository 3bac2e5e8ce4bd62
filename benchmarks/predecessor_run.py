"""Repeat a run of the predecessor project on real text.

    python benchmarks/predecessor_run.py [--data SOURCE] [--seed N]

The run trains tiny for 3 epochs of 126 steps of 2 x 256 tokens. The predecessor is the earlier
implementation that this project replaced. Its numbers came from a
corpus that repeats a few patterns, without validation. No model reaches a loss of 0.82 within 194
thousand tokens of real text, so the two columns of losses cannot be compared; both are shown as
they are.
"""

import argparse
import json
import math
import time
from pathlib import Path

from mmrec.cli.startup import prepare_process

prepare_process(["train"])  # as the command does, before torch is loaded

import torch  # noqa: E402

from mmrec.config import OptimizerConfig, preset  # noqa: E402
from mmrec.data.corpus import Corpus  # noqa: E402
from mmrec.data.dataloader import WindowLoader  # noqa: E402
from mmrec.data.prepare import prepare  # noqa: E402
from mmrec.evaluation.evaluate import evaluate_split  # noqa: E402
from mmrec.model import Model  # noqa: E402
from mmrec.optimizer import build_optimizer  # noqa: E402
from mmrec.profiling.kernel_bench import describe_machine  # noqa: E402
from mmrec.runtime.hardware import bfloat16_instructions  # noqa: E402
from mmrec.training.lr_schedule import lr_factor  # noqa: E402
from mmrec.training.replicas import Replicas, forward_backward, replica_count  # noqa: E402

EPOCHS, STEPS, BATCH, SEQ_LEN = 3, 126, 2, 256
PREDECESSOR_MEANS = (5.7428, 1.7449, 0.9866)  # loss by epoch
PREDECESSOR_FIRST, PREDECESSOR_LAST, PREDECESSOR_MINUTES = 8.6465, 0.8179, 33
RESULTS = Path(__file__).parent / "results" / "predecessor_run.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    corpus = Corpus.open(prepare(args.data, "bpe", 5000, None, print))
    torch.manual_seed(args.seed)
    model = Model(preset("tiny"))
    model.set_precision("bfloat16" if bfloat16_instructions() else "float32")
    config = OptimizerConfig()
    replicas = Replicas(replica_count(model, BATCH))
    optimizer = build_optimizer(model, config, run_tasks=replicas.run)
    loader = WindowLoader(corpus.train.tokens, BATCH, SEQ_LEN, args.seed)
    begin = time.perf_counter()
    forward_backward(model, replicas, *loader.batch_at(0))
    seconds_until_ready = time.perf_counter() - begin

    losses, rows, train_seconds = [], [], 0.0
    print(
        f"{'epoch':>5} {'mean':>9} {'predecessor':>12} {'first':>9} {'last':>9} {'bits/byte':>10}"
    )
    for epoch in range(EPOCHS):
        begin = time.perf_counter()
        for step in range(epoch * STEPS, (epoch + 1) * STEPS):
            fraction_done = (step + 0.5) / (EPOCHS * STEPS)
            optimizer.scale_lr(lr_factor(fraction_done, 0.05, "linear", 0.0))
            optimizer.zero_grad(set_to_none=True)
            loss, _ = forward_backward(model, replicas, *loader.batch_at(step))
            replicas.run([lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)])
            optimizer.step()
            losses.append(loss)
        train_seconds += time.perf_counter() - begin
        epoch_losses = losses[-STEPS:]
        val = evaluate_split(model, corpus.val, corpus.tokenizer, reset_at_documents=False)
        rows.append(
            {
                "mean": sum(epoch_losses) / STEPS,
                "first": epoch_losses[0],
                "last": epoch_losses[-1],
                "validation": val.loss,
                "bits_per_byte": val.bits_per_byte,
            }
        )
        print(
            f"{epoch + 1:>5} {rows[-1]['mean']:>9.4f} {PREDECESSOR_MEANS[epoch]:>12.4f} "
            f"{epoch_losses[0]:>9.4f} {epoch_losses[-1]:>9.4f} {val.bits_per_byte:>10.4f}",
            flush=True,
        )

    expected = math.log(corpus.tokenizer.vocab_size)
    if abs(losses[0] - expected) > 0.15:
        raise SystemExit(
            f"first loss must be near ln vocabulary = {expected:.2f}; got {losses[0]:.4f}"
        )
    tokens = EPOCHS * STEPS * BATCH * SEQ_LEN
    print(
        f"\nloss {losses[0]:.4f} -> {losses[-1]:.4f} on real text "
        f"(predecessor {PREDECESSOR_FIRST} -> {PREDECESSOR_LAST} on repeated patterns)"
    )
    print(
        f"{train_seconds:.1f} s of training, {tokens / train_seconds:,.0f} tokens/s, "
        f"kernels ready after {seconds_until_ready:.1f} s "
        f"(predecessor {PREDECESSOR_MINUTES} minutes, 98 tokens/s: "
        f"{PREDECESSOR_MINUTES * 60 / train_seconds:.0f} times as long)"
    )
    result = {
        "machine": describe_machine(),
        "data": args.data,
        "seed": args.seed,
        "epochs": rows,
        "first": losses[0],
        "last": losses[-1],
        "seconds": train_seconds,
        "tokens_per_second": tokens / train_seconds,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
