"""Search the settings of a contender of the race, for one text, vocabulary and training time.

    python benchmarks/search.py lstm king-james.txt --tokenizer char --seconds 36 108 --trials 24

Every contender, mmrec among them, gets as many trials and the same sampler (Optuna's TPE). A trial
trains for each of the lengths, from the shortest on, each time from the beginning and with a
schedule that ends at that length. Only a trial in the best third at one length goes on to the next
(Optuna's SuccessiveHalvingPruner). The last length is that of the race that the settings are for.
The first trial is the settings that a contender has now. The text is one that the race does not
score. The log, ``benchmarks/results/search/*.log``, is Optuna's journal of all trials; a search
that is started again goes on where it stopped. Needs `optuna`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import optuna
from baselines import pair, settings
from race import measure

from mmrec.config import TRAIN_SETTINGS, preset, preset_train_settings
from mmrec.training import tuning
from mmrec.training.tuning import SEARCHED, Space, open_journal, open_study

LOGS = Path(__file__).parent / "results" / "search"
REDUCTION = 3
"""One trial in so many goes on to the next length."""

LOOP: Space = {
    "optimizer": ["adamw", "muon"],
    "lr": (5e-4, 3e-2),
    "matrix_lr": (5e-3, 1e-1),
    "decay": (1e-2, 3.0),
    "batch": [2, 4, 8, 16, 32],
    "seq_len": [32, 64, 128, 256],
    "warmup": [0.01, 0.03, 0.1],
    "beta2": [0.9, 0.95, 0.99],
    "dropout": [0.0, 0.05, 0.1, 0.2, 0.3],
    "embedding_dropout": [0.0, 0.1, 0.2],
    "ema": [0.0, 0.02, 0.05],
    "bf16": [False, True],
    "compile": [False, True],
}
"""What all baselines have."""
RECURRENT: Space = {
    "width": [128, 192, 256, 320, 384, 512],
    "depth": [1, 2, 3],
    "carry": [False, True],
}
SPACES: dict[str, Space] = {
    "lstm": LOOP | RECURRENT,
    "gru": LOOP | RECURRENT,
    "transformer": LOOP
    | {"width": [128, 192, 256, 320, 384], "depth": [2, 3, 4, 6], "heads": [2, 4]},
    "nanogpt-tuned": {
        key: value
        for key, value in LOOP.items()
        if key not in ("optimizer", "matrix_lr", "embedding_dropout")
    }
    | {"width": [96, 128, 192, 256], "depth": [2, 3, 4, 6]},
    "mingru": LOOP | {"width": [96, 128, 192, 256], "depth": [1, 2, 4]},
    "mamba": LOOP | {"width": [96, 128, 192, 256], "depth": [1, 2, 4]},
    "xlstm": LOOP | {"width": [96, 128, 192, 256], "depth": [1, 2, 4], "slstm": [False, True]},
    "mmrec": SEARCHED
    | {
        "ngram_weight_decay": (1e-1, 5.0),
        "ngram_buckets": [1024, 4096, 8192, 32768],
        "seq_len": [64, 128, 256],
        "warmup": [0.01, 0.03, 0.1],
        "beta2": [0.9, 0.95, 0.99],
        "state": ["window", "carry"],
    },
}


def space_of(name: str) -> Space:
    """The settings of a contender that are searched, without those that its model ignores."""
    ignored = {"mamba": {"dropout"}}.get(name, set())
    if name in ("nanogpt-tuned", "mingru", "mamba"):
        ignored = ignored | {"embedding_dropout"}
    return {key: value for key, value in SPACES[name].items() if key not in ignored}


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """The settings of a trial. AdamW alone has no rate of Muon."""
    chosen = tuning.suggest(trial, {k: v for k, v in space.items() if k != "matrix_lr"})
    if "matrix_lr" in space and chosen.get("optimizer") != "adamw":
        chosen |= tuning.suggest(trial, {"matrix_lr": space["matrix_lr"]})
    return chosen


def current_settings(name: str, args: argparse.Namespace, space: Space) -> dict[str, Any]:
    """The settings that a contender has now, as far as the space holds them."""
    now = settings(name, args.seconds[-1], args.tokenizer, Path(args.data).stat().st_size)
    if name == "mmrec":
        defaults = {key: setting.default for key, setting in TRAIN_SETTINGS.items()}
        model = preset(args.preset, args.tokenizer)
        defaults |= preset_train_settings(args.preset, args.tokenizer)
        defaults |= {"dropout": model.dropout, "ngram_buckets": model.ngram_buckets}
        now = defaults | now
    return {
        key: now[key]
        for key, values in space.items()
        if key in now and (isinstance(values, tuple) or now[key] in values)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=list(SPACES))
    parser.add_argument("data", help="a text file")
    parser.add_argument("--tokenizer", default="char", help="char, byte or bpe")
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[36.0, 108.0], help="lengths of a trial, rising"
    )
    parser.add_argument("--trials", type=int, default=24, help="trials in all")
    parser.add_argument("--set", type=pair, nargs="*", default=[], help="settings of all trials")
    parser.add_argument("--preset", default="tiny", help="mmrec's preset")
    parser.add_argument("--nanogpt", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    space = {key: value for key, value in space_of(args.name).items() if key not in dict(args.set)}
    LOGS.mkdir(parents=True, exist_ok=True)
    stem = f"{Path(args.data).stem}-{args.tokenizer}-{args.seconds[-1]:g}s-{args.name}"
    study = open_study(open_journal(LOGS / f"{stem}.log"), stem)
    study.pruner = optuna.pruners.SuccessiveHalvingPruner(reduction_factor=REDUCTION)
    if not study.trials:
        study.enqueue_trial(current_settings(args.name, args, space))

    def objective(trial: optuna.Trial) -> float:
        chosen = suggest(trial, space)
        for rung, seconds in enumerate(args.seconds):
            row = measure(args.name, args, seconds, 0, dict(args.set) | chosen, curve=False)
            if "error" in row:
                trial.set_user_attr("error", row["error"])
                print(f"failed: {row['error']}: {json.dumps(chosen)}", flush=True)
                raise optuna.TrialPruned
            for key in ("tokens", "parameters", "load", "bits_per_byte"):
                trial.set_user_attr(f"{key} after {seconds:g} s", row[key])
            print(
                f"{seconds:g} s: {row['loss']:.4f} nats, {row['tokens']:,} tokens, "
                f"{row['parameters']:,} parameters: {json.dumps(chosen)}",
                flush=True,
            )
            trial.report(row["loss"], REDUCTION**rung)
            if seconds != args.seconds[-1] and trial.should_prune():
                raise optuna.TrialPruned
        return float(row["loss"])

    done = sum(trial.state.is_finished() for trial in study.trials)
    study.optimize(objective, n_trials=max(0, args.trials - done))
    print(
        f"best of {len(study.trials)}: {study.best_value:.4f} nats with "
        f"{json.dumps(study.best_params)}"
    )


if __name__ == "__main__":
    main()
