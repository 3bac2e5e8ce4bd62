"""The predecessor's run, repeated: tiny, 3 epochs of 126 steps of 2 x 256 tokens, on real text.

    python benchmarks/predecessor_run.py [--data SOURCE] [--seed N]

Its figures came from a corpus that repeats a few patterns, without validation; 194 thousand tokens
of real text cannot be learnt to a loss of 0.82. Both are shown as they are.
"""

import argparse
import json
import math
import time
from pathlib import Path

from mmrec.cli.startup import prepare_process

prepare_process(["train"])  # as the command does, before torch is loaded

import torch  # noqa: E402

from mmrec.config import TrainConfig, preset  # noqa: E402
from mmrec.data.corpus import Corpus  # noqa: E402
from mmrec.data.dataloader import WindowLoader  # noqa: E402
from mmrec.data.prepare import prepare  # noqa: E402
from mmrec.evaluation.evaluate import evaluate  # noqa: E402
from mmrec.model import Model  # noqa: E402
from mmrec.optimizer import MuonAdamW, parameter_groups  # noqa: E402
from mmrec.profiling.kernel_bench import machine  # noqa: E402
from mmrec.runtime.hardware import bfloat16_is_faster  # noqa: E402
from mmrec.training.lr_schedule import lr_factor  # noqa: E402
from mmrec.training.replicas import gradients, lanes_for  # noqa: E402

EPOCHS, STEPS, BATCH, SEQ_LEN = 3, 126, 2, 256
OLD_MEANS, OLD_FIRST, OLD_LAST, OLD_MINUTES = (5.7428, 1.7449, 0.9866), 8.6465, 0.8179, 33
RESULTS = Path(__file__).parent / "results" / "predecessor_run.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    corpus = Corpus.open(prepare(args.data, "bpe", 5000, None, print))
    torch.manual_seed(args.seed)
    model = Model(preset("tiny"))
    model.set_precision("bfloat16" if bfloat16_is_faster() else "float32")
    plan = TrainConfig()
    lanes = lanes_for(model, BATCH)
    optimizer = MuonAdamW(
        parameter_groups(model, plan.weight_decay, plan.table_decay),
        lr=plan.lr,
        betas=(plan.beta1, plan.beta2),
        matrix_lr=plan.muon_lr,
        lanes=lanes,
    )
    batches = WindowLoader(corpus.train.tokens, BATCH, SEQ_LEN, args.seed)
    begin = time.perf_counter()
    gradients(model, lanes, *batches.batch_at(0))
    compiled = time.perf_counter() - begin

    losses, rows, trained = [], [], 0.0
    print(
        f"{'epoch':>5} {'mean':>9} {'predecessor':>12} {'first':>9} {'last':>9} {'bits/byte':>10}"
    )
    for epoch in range(EPOCHS):
        begin = time.perf_counter()
        for step in range(epoch * STEPS, (epoch + 1) * STEPS):
            progress = (step + 0.5) / (EPOCHS * STEPS)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * lr_factor(progress, 0.05, "linear", 0.0)
            optimizer.zero_grad(set_to_none=True)
            loss, _ = gradients(model, lanes, *batches.batch_at(step))
            lanes.run([lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)])
            optimizer.step()
            losses.append(loss)
        trained += time.perf_counter() - begin
        mine = losses[-STEPS:]
        val = evaluate(model, corpus.val.tokens, corpus.tokenizer.eot, corpus.val.n_bytes)
        rows.append(
            {
                "mean": sum(mine) / STEPS,
                "first": mine[0],
                "last": mine[-1],
                "validation": val.loss,
                "bits_per_byte": val.bits_per_byte,
            }
        )
        print(
            f"{epoch + 1:>5} {rows[-1]['mean']:>9.4f} {OLD_MEANS[epoch]:>12.4f} {mine[0]:>9.4f} "
            f"{mine[-1]:>9.4f} {val.bits_per_byte:>10.4f}",
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
        f"(predecessor {OLD_FIRST} -> {OLD_LAST} on repeated patterns)"
    )
    print(
        f"{trained:.1f} s of training, {tokens / trained:,.0f} tokens/s, kernels ready after "
        f"{compiled:.1f} s (predecessor {OLD_MINUTES} minutes, 98 tokens/s: "
        f"{OLD_MINUTES * 60 / trained:.0f} times as long)"
    )
    made = {
        "machine": machine(),
        "data": args.data,
        "seed": args.seed,
        "epochs": rows,
        "first": losses[0],
        "last": losses[-1],
        "seconds": trained,
        "tokens_per_second": tokens / trained,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
