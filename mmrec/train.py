"""The training loop: budget, steps, validation, checkpoints, and an end that loses nothing."""

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from mmrec import checkpoint
from mmrec.config import (
    DEFAULT_STEPS,
    InputError,
    ModelConfig,
    TrainConfig,
    from_dict,
    to_toml,
)
from mmrec.data.batches import Batches, spread_pieces
from mmrec.data.corpus import Corpus
from mmrec.evaluate import LANES, Evaluation, evaluate
from mmrec.files import keep_trying, sweep, write_text
from mmrec.model import Model, probe_bfloat16
from mmrec.optimizer import Muon
from mmrec.run import COLUMNS, Log, clock, epoch_row, overfitting
from mmrec.schedule import lr_factor

Echo = Callable[[str], None]


class TrainingDiverged(Exception):
    """The loss or a gradient became NaN or infinite; the weights were not updated with it."""


@dataclasses.dataclass
class Progress:
    """Where a run stands: everything besides weights and random state that a resume needs."""

    step: int = 0
    seconds: float = 0.0
    """Training time so far, validation and saving not counted."""
    best: float = math.inf
    """Lowest loss on the validation subset."""
    best_step: int = 0
    waited: int = 0
    """Checks since the best."""
    epoch: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The epoch under way: sum and count of losses, first, last."""
    epochs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    checks: list[dict[str, float]] = dataclasses.field(default_factory=list)
    since_check: list[float] = dataclasses.field(default_factory=list)


class Trainer:
    """One run: its model, data, optimizer and folder."""

    def __init__(
        self,
        folder: Path,
        corpus: Corpus,
        model_config: ModelConfig,
        config: TrainConfig,
        preset: str,
        echo: Echo = print,
    ) -> None:
        self.folder, self.corpus, self.config, self.preset = folder, corpus, config, preset
        self.echo = echo
        torch.manual_seed(config.seed)
        self.model = Model(
            dataclasses.replace(model_config, vocab_size=corpus.tokenizer.vocab_size)
        )
        wants = config.precision == "bfloat16" or (config.precision == "auto" and probe_bfloat16())
        self.precision = "bfloat16" if wants else "float32"
        self.model.set_precision(self.precision)
        self.batches = Batches(corpus.train.tokens, config.batch, config.seq_len, config.seed)
        if corpus.val.n_tokens <= config.seq_len:
            raise InputError(
                f"the validation split must hold one window of {config.seq_len + 1} tokens; it has "
                f"{corpus.val.n_tokens}: use more text or a smaller seq_len"
            )
        self.optimizer = Muon(
            self.model.parameter_groups(config.weight_decay),
            lr=config.lr, betas=(config.beta1, config.beta2), muon_lr=config.muon_lr,
        )  # fmt: skip
        table = [len(corpus.tokenizer.token_bytes(i)) for i in range(corpus.tokenizer.vocab_size)]
        self.subset = spread_pieces(corpus.val.tokens, config.eval_tokens, LANES)
        self.subset_bytes = max(1, sum(table[t] for t in self.subset.tolist()))
        self.progress = Progress()
        self.val: Evaluation | None = None
        self.signal = 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training split."""
        return max(1, self.batches.steps_per_epoch // self.config.accumulate)

    @property
    def total_steps(self) -> int | None:
        """Length of the run in steps; None if minutes set it."""
        c = self.config
        if c.minutes is not None:
            return None
        if c.epochs is not None:
            return max(1, round(c.epochs * self.steps_per_epoch))
        return c.steps or DEFAULT_STEPS

    def fraction(self, ahead: float = 0.0) -> float:
        """How far the run is, 0 to 1, or will be ``ahead`` steps from now."""
        p = self.progress
        if self.config.minutes is not None:
            return min(1.0, p.seconds * (1 + ahead / max(1, p.step)) / (60 * self.config.minutes))
        return min(1.0, (p.step + ahead) / (self.total_steps or 1))

    def gradients(self, step: int) -> float:
        """Accumulate the gradients of a step; return its mean loss."""
        total, n = 0.0, self.config.accumulate
        for i in range(n):
            loss = self.model.loss(*self.batches.get(step * n + i))
            (loss / n).backward()
            total += loss.item() / n
        return total

    def warm_up(self) -> tuple[float, float]:
        """Compile the kernels and time a step without taking one: (seconds of both)."""
        state, times = torch.get_rng_state(), []
        for _ in range(4):
            begin = time.perf_counter()
            self.gradients(0)
            self.model.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - begin)
        torch.set_rng_state(state)
        return times[0], sorted(times[1:])[1] * 1.2  # the optimizer takes about a sixth of a step

    def take_step(self) -> tuple[float, float, float]:
        """One optimizer step; returns loss, gradient norm and learning rate."""
        c = self.config
        factor = lr_factor(self.fraction(0.5), c.warmup, c.schedule, c.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.gradients(self.progress.step)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
            raise TrainingDiverged(
                f"{what} at step {self.progress.step + 1}: stopped before it reached the weights"
            )
        self.optimizer.step()
        return loss, norm, c.lr * factor

    def save(self, name: str, *, whole: bool) -> None:
        """Write a checkpoint; ``whole`` ones can be resumed from."""
        val = dataclasses.asdict(self.val) if self.val else None
        info = {"preset": self.preset, "train": dataclasses.asdict(self.config), "val": val,
                "source": self.corpus.info["source"], "precision": self.precision,
                "fingerprint": self.corpus.info["fingerprint"]}  # fmt: skip
        extra = (self.optimizer, dataclasses.asdict(self.progress)) if whole else (None, None)
        path, tokenizer = self.folder / name, self.corpus.tokenizer
        step = self.progress.step
        keep_trying(lambda: checkpoint.save(path, self.model, tokenizer, step, info, *extra))

    def check(self, log: Log) -> bool:
        """Validate on the fixed subset; keep the best model. True if it is time to stop early."""
        p = self.progress
        self.val = evaluate(self.model, self.subset, self.corpus.tokenizer.eot, self.subset_bytes)
        train = sum(p.since_check) / max(1, len(p.since_check))
        p.since_check = []
        p.checks.append({"step": p.step, "val": self.val.loss, "train": train})
        log.write("val", p.step, loss=self.val.loss, bits_per_byte=self.val.bits_per_byte)
        if self.val.loss < p.best:
            p.best, p.best_step, p.waited = self.val.loss, p.step, 0
            self.save("best.h5", whole=False)
        else:
            p.waited += 1
        words = overfitting(p.checks)
        if words:
            self.echo(words)
        return 0 < self.config.patience <= p.waited

    def end_epoch(self, log: Log, share: float = 1.0) -> None:
        """Validate on the whole split, add a row to the table; ``share`` of an epoch was seen."""
        p, e = self.progress, self.progress.epoch
        if not e:
            return
        val = self.corpus.val
        scores = evaluate(self.model, val.tokens, self.corpus.tokenizer.eot, val.n_bytes)
        number = len(p.epochs) + 1
        row = {"epoch": number if share == 1 else round(number - 1 + share, 2),
               "mean": e["sum"] / e["count"], "first": e["first"], "last": e["last"],
               "val_loss": scores.loss, "perplexity": scores.perplexity,
               "bits_per_byte": scores.bits_per_byte, "accuracy": scores.accuracy,
               "seconds": p.seconds - e["began"]}  # fmt: skip
        p.epochs.append(row)
        p.epoch = {}
        log.write("epoch", p.step, **{k: v for k, v in row.items() if k != "seconds"})
        if number == 1:
            self.echo(COLUMNS)
        self.echo(epoch_row(row))

    def count(self, loss: float) -> None:
        """Add the loss of a step to the epoch under way."""
        p = self.progress
        p.since_check.append(loss)
        if not p.epoch:
            p.epoch = {"sum": 0.0, "count": 0, "first": loss, "began": p.seconds}
        p.epoch.update(sum=p.epoch["sum"] + loss, count=p.epoch["count"] + 1, last=loss)

    def announce(self) -> None:
        """Say what will be trained on what, for how long."""
        c, t, v = self.config, self.corpus.train, self.corpus.val
        count = sum(x.numel() for x in self.model.parameters())
        per_step = c.batch * c.seq_len * c.accumulate
        self.echo(f"model   {self.preset}: {count / 1e6:.2f} M parameters, {self.precision}")
        self.echo(f"data    {self.corpus.info['source']}: {t.n_tokens:,} training tokens, "
                  f"{v.n_tokens:,} validation tokens")  # fmt: skip
        compiled, each = self.warm_up()
        rate = per_step / each
        if self.total_steps is None:
            steps = int(60 * (c.minutes or 0) / each)
            length = f"{c.minutes:g} min of training, about {steps:,} steps"
        else:
            steps, length = self.total_steps, f"{self.total_steps:,} steps"
        left = max(0, steps - self.progress.step)
        whole = math.ceil(steps / self.steps_per_epoch)  # times that the whole split is scored
        checks = steps / c.eval_every * len(self.subset) + whole * v.n_tokens
        # scoring a token costs about half of learning from it
        estimate = left * each + checks / (2 * rate) * left / max(1, steps)
        self.echo(f"budget  {length} of {per_step:,} tokens = {steps * per_step / 1e6:.2f} M, "
                  f"{steps / self.steps_per_epoch:.2f} epochs")  # fmt: skip
        self.echo(f"time    about {clock(estimate)} at {rate:,.0f} tokens/s "
                  f"(kernels ready after {compiled:.0f} s); run folder {self.folder}")  # fmt: skip

    def run(self, log: Log) -> str:
        """Train to the end of the budget; returns why it ended: done, early or signal."""
        c, p = self.config, self.progress
        self.model.train()
        per_step = c.batch * c.seq_len * c.accumulate
        why = "done"
        bar = tqdm(total=self.total_steps, initial=p.step, unit="step", dynamic_ncols=True,
                   mininterval=0.5 if os.isatty(2) else 30.0, smoothing=0.05)  # fmt: skip
        echo = self.echo

        def above_the_bar(line: str) -> None:
            bar.clear()
            echo(line)
            bar.refresh()

        self.echo = above_the_bar
        try:
            while self.fraction() < 1.0:
                begin = time.perf_counter()
                loss, norm, lr = self.take_step()
                p.step += 1
                p.seconds += time.perf_counter() - begin
                self.count(loss)
                log.write("train", p.step, loss=loss, lr=lr, norm=norm)
                rate = per_step / (time.perf_counter() - begin)
                bar.set_postfix_str(f"loss {loss:.3f} lr {lr:.1e} {rate:,.0f} tok/s", refresh=False)
                bar.update()
                due = p.step % c.eval_every == 0 or self.fraction() >= 1.0
                early = due and self.check(log)
                if p.step % self.steps_per_epoch == 0:
                    self.end_epoch(log)
                if p.step % c.save_every == 0:
                    self.save(f"step-{p.step}.h5", whole=True)
                    checkpoint.trim(self.folder, max(1, c.keep))  # one is needed until the end
                if self.signal or early:
                    why = "signal" if self.signal else "early"
                    break
            if why != "signal":
                self.end_epoch(log, p.step % self.steps_per_epoch / self.steps_per_epoch or 1.0)
        finally:
            bar.close()
            self.echo = echo
        self.save("last.h5", whole=True)
        checkpoint.trim(self.folder, c.keep)
        return why

    def summary(self, why: str) -> dict[str, Any]:
        """Write summary.json and return it."""
        p = self.progress
        tokens = p.step * self.config.batch * self.config.seq_len * self.config.accumulate
        made = {"ended": why, "steps": p.step, "tokens": tokens, "seconds": round(p.seconds, 1),
                "tokens_per_second": round(tokens / max(p.seconds, 1e-9)), "best_step": p.best_step,
                "best_subset_loss": p.best, "epochs": p.epochs}  # fmt: skip
        path, text = self.folder / "summary.json", json.dumps(made, indent=1) + "\n"
        keep_trying(lambda: write_text(path, text))
        return made


def train(trainer: Trainer, *, resume: bool = False) -> dict[str, Any]:
    """Run a trainer to its end and return the summary.

    SIGINT or SIGTERM finish the step, save ``last.h5`` and end the run with ``ended: signal``; a
    second one ends the process at once.

    Raises:
        TrainingDiverged: the loss is no longer finite; the checkpoints written before are whole.
        StorageError: a checkpoint could not be written; earlier ones are whole.
    """
    folder, p = trainer.folder, trainer.progress
    sweep(folder)
    if resume:
        path, info, values = checkpoint.resume(
            folder, trainer.model, trainer.optimizer, trainer.echo
        )
        if info["fingerprint"] != trainer.corpus.info["fingerprint"]:
            raise InputError(f"the text of {trainer.config.data} changed since {path} was saved")
        trainer.progress = p = from_dict(Progress, values)
        trainer.echo(f"resume  {path}, step {p.step:,}")
    config = to_toml(trainer.model.config, trainer.config, trainer.preset)
    write_text(folder / "config.toml", config)
    log = Log(folder, p.step if resume else None)

    def stop(number: int, frame: FrameType | None) -> None:
        trainer.signal = number
        for s in before:  # the next one ends the process at once
            signal.signal(s, signal.SIG_DFL)

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    for s in before:
        signal.signal(s, stop)
    try:
        trainer.announce()
        why = trainer.run(log)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        log.close()
    return trainer.summary(why)
