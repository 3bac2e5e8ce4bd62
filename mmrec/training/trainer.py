"""The training loop: budget, steps, validation, checkpoints, and an end that loses nothing."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmrec.checkpoint import manager as saved
from mmrec.config import DEFAULT_EPOCHS, ModelConfig, TrainConfig, to_toml
from mmrec.data.corpus import Corpus
from mmrec.errors import (
    InputError,
    InterruptedTrainingError,
    TrainingDivergedError,
    WeightsDivergedError,
)
from mmrec.evaluation.evaluate import Evaluation, evaluate
from mmrec.runtime.atomic import keep_trying, write_text
from mmrec.runtime.distributed import ALONE, World
from mmrec.training import divergence as guard
from mmrec.training.run_dir import COLUMNS, Lock, Log, NoLog, clock, epoch_row, overfitting, verdict
from mmrec.training.state import State, conditions

Echo = Callable[[str], None]
MANY_EPOCHS = 16  # beyond, a strong weight decay helped, too: by character, one seed (decisions.md)


class Trainer(State):
    """One run in its folder: steps, and what is measured, said and saved between them."""

    def __init__(
        self,
        folder: Path,
        corpus: Corpus,
        model_config: ModelConfig,
        config: TrainConfig,
        preset: str,
        echo: Echo = print,
        world: World = ALONE,
    ) -> None:
        super().__init__(folder, corpus, model_config, config, preset, world)
        self.echo = echo

    @property
    def early(self) -> bool:
        """Whether the validation loss has not improved for too long."""
        return 0 < self.config.patience <= self.progress.waited

    def saved(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return bool(self.world.told(saved.run_checkpoints(self.folder)))

    def save_whole(self, name: str, log: Log) -> None:
        """Write a checkpoint to resume from, after the metrics that it counts on."""
        self.progress.lines = log.sync()
        self.save(name, whole=True)

    def score(self, tokens: np.ndarray, n_bytes: int) -> Evaluation:
        """Scores of tokens (n,) of the validation split. All processes score all of them, since a
        sharded layer is whole in all or in none; what rank 0 found counts."""
        try:
            found = evaluate(
                self.model,
                tokens,
                self.corpus.tokenizer.eot,
                n_bytes,
                resets=self.resets,
                progress=self.stop.check,
            )
        finally:
            self.world.rest(self.model)
        return self.world.told(found)

    def check(self, log: Log) -> None:
        """Validate on the fixed subset; keep the best model."""
        p = self.progress
        val = self.score(self.subset, self.subset_bytes)
        if not math.isfinite(val.loss):
            raise WeightsDivergedError(f"validation loss {val.loss} at step {p.step}")
        self.val = val
        train = sum(p.since_check) / max(1, len(p.since_check))
        p.since_check = []
        p.checks.append({"step": p.step, "val": val.loss, "train": train})
        log.write("val", p.step, loss=val.loss, bits_per_byte=val.bits_per_byte)
        if p.best is None or val.loss < p.best:
            p.best, p.best_step, p.waited = val.loss, p.step, 0
            if self.ahead is None or val.loss <= self.ahead[0]:
                self.save("best.h5", whole=False)
                self.ahead = None
        else:
            p.waited += 1
        words = overfitting(p.checks)
        if words:
            self.echo(words)

    def end_epoch(self, log: Log, share: float = 1.0) -> None:
        """Validate on the whole split, add a row to the table; ``share`` of an epoch was seen."""
        p, e = self.progress, self.progress.epoch
        if not e:
            return
        scores = self.score(self.corpus.val.tokens, self.corpus.val.n_bytes)
        number = len(p.epochs) + 1
        row = {
            "epoch": number if share == 1 else round(number - 1 + share, 2),
            "mean": e["sum"] / e["count"],
            "first": e["first"],
            "last": e["last"],
            "val_loss": scores.loss,
            "perplexity": scores.perplexity,
            "bits_per_byte": scores.bits_per_byte,
            "accuracy": scores.accuracy,
            "seconds": p.seconds - e["began"],
        }
        p.epochs.append(row)
        p.epoch = {}
        log.write("epoch", p.step, **{k: v for k, v in row.items() if k != "seconds"})
        if number == 1:
            self.echo(COLUMNS)
        self.echo(epoch_row(row))

    def settle(self, log: Log) -> None:
        """What is due after a step and was not done yet: a signal may have cut it short."""
        p = self.progress
        due = p.step > 0 and (p.step % self.config.eval_every == 0 or self.fraction() >= 1.0)
        if due and not (p.checks and p.checks[-1]["step"] == p.step):
            self.check(log)
        if p.step % self.steps_per_epoch == 0:
            self.end_epoch(log)

    def diverged(self, error: TrainingDivergedError, log: Log) -> None:
        """Go on as ``on_nan`` says, or save what is good and raise the error."""
        p, policy = self.progress, self.config.on_nan
        self.carried = self.carried_before  # what came of the step may be no number
        limit = guard.limit_reached(policy, p.in_row, p.skipped, p.rollbacks)
        if (
            policy == "stop"
            or limit
            or (policy == "skip" and isinstance(error, WeightsDivergedError))
        ):
            torch.set_rng_state(self.rng)  # a resume takes the same step again
            with contextlib.suppress(WeightsDivergedError):
                self.save_whole("last.h5", log)
            raise type(error)(f"{error}{f' {limit}' if limit else ''}")
        if policy == "skip":
            p.moved, p.skipped, p.in_row = p.moved + 1, p.skipped + 1, p.in_row + 1
            self.echo(f"skipped: {error}; the step is left out, as --on-nan says")
        else:
            self.load_furthest()
            now, self.progress.seconds = self.progress, p.seconds
            now.moved = p.step + p.moved + 1 - now.step
            now.rate, now.rollbacks = p.rate * guard.CUT, p.rollbacks + 1
            log.rewind(now.lines)
            self.echo(
                f"rollback: {error}; back to step {now.step:,}, on with other data and "
                f"{now.rate:g} of the learning rates"
            )
        log.write(policy, self.progress.step, why=str(error))

    def load_furthest(self) -> tuple[Path, dict[str, Any]]:
        """Go on from the furthest whole checkpoint; return its path, which rank 0 alone knows, and
        its info."""
        if self.world.rank:
            return self.folder, self.load(self.folder)
        return saved.resume(self.folder, self.load, self.echo)

    def trim(self, keep: int) -> None:
        """Remove all but the newest step-N checkpoints."""
        if self.world.rank == 0:
            saved.trim(self.folder, keep)

    def watch(self, log: Log) -> None:
        """Say when the loss jumps, but not at every jump."""
        p = self.progress
        if p.spike and p.step - p.spike < guard.QUIET:
            return
        losses = log.losses(guard.WINDOW + 1)
        median = guard.spike(losses)
        if median is not None:
            p.spike = p.step
            self.echo(
                f"spike: loss {losses[-1]:.3f} at step {p.step:,}, its running median is "
                f"{median:.3f}; if it does not come down again, a lower --lr and --muon-lr "
                "help"
            )

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
        weights = [*self.model.parameters()]
        count = sum(x.numel() for x in weights)
        learn = sum(x.numel() for x in weights if x.requires_grad)
        part = "" if learn == count else f", of which {learn / 1e6:.2f} M learn"
        per_step = c.batch * c.seq_len * c.accumulate
        self.echo(
            f"model   {self.preset}: {count / 1e6:.2f} M parameters{part}, {self.config.precision}"
        )
        self.echo(
            f"data    {self.corpus.info['source']}: {t.n_tokens:,} training tokens, "
            f"{v.n_tokens:,} validation tokens"
        )
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
        self.echo(
            f"budget  {length} of {per_step:,} tokens = {steps * per_step / 1e6:.2f} M, "
            f"{steps / self.steps_per_epoch:.2f} epochs"
        )
        if steps > DEFAULT_EPOCHS * self.steps_per_epoch and not self.model.config.dropout:
            passes, advice = DEFAULT_EPOCHS, "0.1"
            if steps > MANY_EPOCHS * self.steps_per_epoch:
                passes, advice = MANY_EPOCHS, "0.2 with --weight-decay 1"
            self.echo(
                f"note    more than {passes} passes learn a text by heart: "
                f"--dropout {advice} helps against it"
            )
        self.echo(
            f"time    about {clock(estimate)} at {rate:,.0f} tokens/s "
            f"(kernels ready after {compiled:.0f} s); run folder {self.folder}"
        )

    def run(self, log: Log) -> str:
        """Train to the end of the budget; returns why it ended: done, early or signal."""
        self.model.train()
        echo, why = self.echo, "signal"
        try:
            self.announce()
            if self.config.on_nan == "rollback" and not self.saved():
                self.save_whole("step-0.h5", log)
            with tqdm(
                total=self.total_steps,
                initial=self.progress.step,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5 if os.isatty(2) else 30.0,
                smoothing=0.05,
            ) as bar:

                def above_the_bar(line: str) -> None:
                    bar.clear()
                    echo(line)
                    bar.refresh()

                self.echo = above_the_bar
                self.loop(log, bar)
                if not self.stop.number:
                    share = self.progress.step % self.steps_per_epoch / self.steps_per_epoch
                    self.end_epoch(log, share or 1.0)
                    why = "early" if self.early else "done"
        except InterruptedTrainingError:
            pass
        finally:
            self.echo = echo
        self.save_whole("last.h5", log)
        self.trim(self.config.keep)
        return why

    def loop(self, log: Log, bar: Any) -> None:
        """Steps, and what is due after them, until the budget, the patience or a signal ends it."""
        c = self.config
        per_step = c.batch * c.seq_len * c.accumulate
        while True:
            p = self.progress
            try:
                self.settle(log)
                if p.step and p.step % c.save_every == 0:
                    self.save_whole(f"step-{p.step}.h5", log)
                    self.trim(max(1, c.keep))  # one is needed until the end
                if self.stop.came() or self.early or self.fraction() >= 1.0:
                    return
                begin = time.perf_counter()
                loss, norm, lr = self.take_step()
            except TrainingDivergedError as error:
                self.diverged(error, log)
                bar.n = self.progress.step
                continue
            p.step, p.in_row = p.step + 1, 0
            seconds = self.world.most(time.perf_counter() - begin)
            p.seconds += seconds
            self.count(loss)
            log.write("train", p.step, loss=loss, lr=lr, norm=norm)
            self.watch(log)
            text = f"loss {loss:.3f} lr {lr:.1e} {per_step / seconds:,.0f} tok/s"
            bar.set_postfix_str(text, refresh=False)
            bar.update()

    def summary(self, why: str) -> dict[str, Any]:
        """Write summary.json and return it."""
        p = self.progress
        tokens = p.step * self.config.batch * self.config.seq_len * self.config.accumulate
        best, step = self.ahead or (p.best, p.best_step)
        reason = "" if best is None else verdict(p.checks, best, step)
        made = {
            "ended": why,
            "steps": p.step,
            "tokens": tokens,
            "seconds": round(p.seconds, 1),
            "tokens_per_second": round(tokens / max(p.seconds, 1e-9)),
            "best_step": step,
            "best_subset_loss": best,
            "best_because": reason,
            "skipped": p.skipped,
            "rollbacks": p.rollbacks,
            "epochs": p.epochs,
        }
        path, text = self.folder / "summary.json", json.dumps(made, indent=1) + "\n"
        if self.world.rank == 0:
            keep_trying(lambda: write_text(path, text))
        return made


def train(trainer: Trainer, *, resume: bool = False, lock: Lock | None = None) -> dict[str, Any]:
    """Run a trainer to its end and return the summary.

    The first SIGINT, SIGTERM or SIGHUP finishes the step, saves ``last.h5`` and ends the run with
    ``ended: signal``; a second one ends the process at once.

    Args:
        trainer: a new one.
        resume: go on with the newest checkpoint of its folder, or from the start if the run ended
            before its first.
        lock: that of the folder, if the caller has it already.

    Raises:
        RunLockedError: another process writes in the folder.
        TrainingDivergedError: a loss or gradient is no longer finite and ``on_nan`` does not go on;
            ``last.h5`` is the state before that step.
        StorageError: a checkpoint could not be written; earlier ones are whole.
    """
    folder = trainer.folder
    first = trainer.world.rank == 0  # of several processes, one has the folder
    held = (lock or Lock(folder)) if first else contextlib.nullcontext()
    with held, trainer.stop:
        torch.set_rng_state(trainer.rng)  # whatever was drawn since the trainer was made
        if resume:
            _restore(trainer)
        elif trainer.config.grow_from:  # before there is anything that could be resumed without it
            trainer.save("step-0.h5", whole=True)
            if trainer.world.size > 1:
                trainer.load(folder / "step-0.h5")  # rank 0 alone was given what it holds
        config = to_toml(trainer.model.config, trainer.config, trainer.preset)
        if first:
            write_text(folder / "config.toml", config)
        log = Log(folder, trainer.progress if resume else None) if first else NoLog()
        try:
            why = trainer.run(log)
        finally:
            log.close()
        return trainer.summary(why)


def _restore(trainer: Trainer) -> None:
    if not trainer.saved():
        if not (trainer.folder / "config.toml").exists():
            raise InputError(f"{trainer.folder} holds no checkpoint to resume from")
        if trainer.config.grow_from:
            raise InputError(
                f"{trainer.folder} lost its checkpoints, and with them what it "
                "was grown from: start it again"
            )
        trainer.find_ahead()
        trainer.echo(f"resume  {trainer.folder} ended before its first checkpoint: from the start")
        return
    path, info = trainer.load_furthest()
    was, now = info.get("conditions", {}), conditions()
    trainer.echo(f"resume  {path}, step {trainer.progress.step:,}")
    other = ", ".join(f"{k} {was[k]}, now {now[k]}" for k in was if was[k] != now.get(k))
    if other:
        trainer.echo(
            f"note    trained with {other}: what follows is close to what would have "
            "been, not equal bit for bit"
        )
