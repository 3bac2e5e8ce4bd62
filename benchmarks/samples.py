"""What the text at each validation costs, as a share of the time between two validations.

    python benchmarks/samples.py

Writes results/samples.json. For tiny by BPE and by character, a trainer takes steps and writes
texts in turns. The share is the median time of a text over the median time of the steps between two
validations.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from outputs import add_force, check_results

from mmrec.profiling.kernel_bench import describe_machine
from mmrec.training.setup import begin_run, plan_run

RESULTS = Path(__file__).parent / "results" / "samples.json"


def measure(data: str, preset: str, tokenizer: str, seconds: float) -> dict[str, Any]:
    """Measure one model.

    Args:
        data: the text.
        preset: its shape.
        tokenizer: kind of the tokenizer.
        seconds: how long to measure, after a pass that compiles.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = {"data": data, "tokenizer": tokenizer, "out": f"{folder}/run", "steps": 10**6}
        lock, trainer = begin_run(plan_run(preset, None, given), echo=lambda line: None)
        with lock:
            sampler = trainer._sampler
            assert sampler is not None
            for _ in range(2):  # what compiles does not count
                trainer.train_step()
                sampler.write(trainer.model)
            steps, texts = list[float](), list[float]()
            end = time.perf_counter() + seconds
            while len(texts) < 4 or time.perf_counter() < end:
                begin = time.perf_counter()
                trainer.train_step()
                middle = time.perf_counter()
                sampler.write(trainer.model)
                steps.append(middle - begin)
                texts.append(time.perf_counter() - middle)
        step, text = statistics.median(steps), statistics.median(texts)
        evaluation = trainer.config.evaluation
        return {
            "preset": preset,
            "tokenizer": tokenizer,
            "precision": trainer.config.optimizer.precision,
            "sample_tokens": evaluation.sample_tokens,
            "eval_every": evaluation.eval_every,
            "step_ms": round(1000 * step, 1),
            "text_ms": round(1000 * text, 1),
            "share": round(text / (evaluation.eval_every * step + text), 5),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="stdlib", help="text to train on")
    parser.add_argument("--seconds", type=float, default=10.0, help="time of each measurement")
    add_force(parser)
    options = parser.parse_args()
    check_results(parser, options, RESULTS)
    rows = []
    for tokenizer in ("bpe", "char"):
        rows.append(measure(options.data, "tiny", tokenizer, options.seconds))
        print(json.dumps(rows[-1]), flush=True)
    results = {"machine": describe_machine(), "data": options.data, "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
