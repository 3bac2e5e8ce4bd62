"""What bfloat16 and int8 weights cost: bits per byte on a run's whole validation split.

    python benchmarks/weight_dtypes.py RUN [RUN …]

Writes results/weight_dtypes.json.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from outputs import add_force, check_results

from mmrec.checkpoint.checkpoint import load_model
from mmrec.checkpoint.manager import find_checkpoint
from mmrec.config import WEIGHT_DTYPES
from mmrec.evaluation.source import open_split
from mmrec.inference.decoder import Decoder
from mmrec.profiling.kernel_bench import describe_machine

RESULTS = Path(__file__).parent / "results" / "weight_dtypes.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    add_force(parser)
    options = parser.parse_args()
    check_results(parser, options, RESULTS)
    rows = []
    for run in options.runs:
        path = find_checkpoint(run)
        split, _ = open_split(load_model(path), None)
        tokens = np.asarray(split.tokens)
        for weights in WEIGHT_DTYPES:
            decoder = Decoder.load(path, weights=weights)
            sizes = [len(decoder.tokenizer.token_bytes(int(t))) for t in tokens]
            logprobs = decoder.score(decoder.initial_state(), tokens).logprobs
            nats = -float(logprobs.sum(dtype=np.float64))
            rows.append(
                {
                    "run": run.name,
                    "step": decoder.step,
                    "tokens": len(tokens),
                    "weights": weights,
                    "bits_per_byte": round(nats / math.log(2) / sum(sizes), 5),
                    "megabytes_per_token": round(decoder.bytes_per_token / 1e6, 2),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    RESULTS.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
