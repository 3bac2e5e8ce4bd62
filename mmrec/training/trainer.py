"""The trainer: one run in its folder, from the first step to the summary.

Read ``Trainer.fit`` first, then ``Trainer.train_step``. A run is resumed bit for bit: everything
that a step depends on is the configuration, the corpus, and what ``Trainer.save`` writes.
"""

import contextlib
import dataclasses
import json
import math
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmrec.checkpoint import manager
from mmrec.checkpoint.checkpoint import (
    load_model,
    read_recurrent_state,
    restore_training_state,
    save_checkpoint,
)
from mmrec.checkpoint.header import read_metadata
from mmrec.config import (
    DEFAULT_EPOCHS,
    DEFAULT_TOKENS,
    MIN_DEFAULT_STEPS,
    ModelConfig,
    TrainConfig,
    config_to_toml,
    seconds_until,
)
from mmrec.data.corpus import EVALUATION_STREAMS, Corpus
from mmrec.data.dataloader import (
    ConversationLoader,
    MixtureLoader,
    ReplayLoader,
    WindowLoader,
    evenly_spaced_sample,
    make_loader,
)
from mmrec.data.document_record import DOCUMENTS_FILE
from mmrec.data.prepare import open_corpus
from mmrec.errors import (
    InputError,
    InterruptedTrainingError,
    StorageError,
    TrainingDivergedError,
    WeightsDivergedError,
)
from mmrec.evaluation.evaluate import Evaluation, evaluate
from mmrec.finetune.freeze import freeze_parameters
from mmrec.lora import apply_lora
from mmrec.model import Model, State
from mmrec.optimizer import build_optimizer, clipped_parameters
from mmrec.runtime import malloc
from mmrec.runtime.atomic import atomic_write_text, never_retry, write_with_retry
from mmrec.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from mmrec.runtime.hardware import fastest_dtype, resolve_precision
from mmrec.runtime.interrupts import StopSignal
from mmrec.runtime.locking import FolderLock
from mmrec.runtime.machine import memory_bytes
from mmrec.runtime.numeric import cdiv
from mmrec.runtime.progress import progress_bar
from mmrec.training import divergence
from mmrec.training.callbacks import Callback
from mmrec.training.distillation import MAX_TABLE_BYTES, Teachers, distillation_loss
from mmrec.training.lr_schedule import lr_factor
from mmrec.training.metrics import (
    EPOCH_HEADER,
    MetricsLog,
    NullMetricsLog,
    Progress,
    epoch_row,
    explain_best_model,
    format_duration,
    format_tokens,
    from_plain,
    overfitting_warning,
)
from mmrec.training.replica_processes import MEMORY_BYTES
from mmrec.training.replicas import (
    Replicas,
    concat_states,
    count_targets,
    forward_backward,
    replica_count,
    split_state,
)
from mmrec.training.run_dir import CONFIG_MARK
from mmrec.training.samples import SampleLog, Sampler, describe_prompt, describe_sample
from mmrec.training.status import REPORT_FILE, StatusReporter
from mmrec.training.weight_average import WeightAverage

MIN_READ_SHARE = 0.95
"""Share of the training tokens below which an epoch is said to leave some out."""
MIN_SECONDS_FOR_PROCESSES = 30.0
"""A shorter run keeps its threads: processes start in three to four seconds of a core's time."""
MAX_SHARE_OF_MEMORY = 0.25
"""Share of the machine's memory that processes of replicas may take beyond that of threads."""
MANY_EPOCHS = 16
"""Beyond this many passes a strong weight decay helps too (docs/development/decisions)."""


class Trainer:
    """A run: its model, data and optimizer, and what is measured, printed and saved between steps.

    Attributes:
        run_dir: the run folder.
        config: the settings, with ``precision`` resolved.
        model, optimizer, loader, corpus: what is trained, with what, on what.
        progress: where the run stands.
        process_group: the processes that train together.
    """

    def __init__(
        self,
        run_dir: Path,
        corpus: Corpus,
        model_config: ModelConfig,
        config: TrainConfig,
        preset: str,
        *,
        echo: Callable[[str], None] = print,
        process_group: ProcessGroup = SINGLE_PROCESS,
        callbacks: Sequence[Callback] = (),
        retry: Callable[[StorageError], bool] = never_retry,
        show_progress: bool = True,
        draw_curve: bool = True,
    ) -> None:
        """Build the model, the loader and the optimizer; nothing is written yet.

        Args:
            run_dir: the run folder.
            corpus: the tokenised text.
            model_config: the shape; its vocabulary is set to the tokenizer's.
            config: the settings.
            preset: name of the preset that the shape comes from.
            echo: called with each line of text for the user.
            process_group: the processes that train together.
            callbacks: see ``Callback``; in a single process only.
            retry: asked after a failed write whether to try again.
            show_progress: whether to show a progress bar, or a line a minute without a terminal.
            draw_curve: whether to draw ``loss.png``.

        Raises:
            InputError: the settings or callbacks do not fit the corpus, the model or the processes.
        """
        self.run_dir, self.corpus, self.config, self.preset = run_dir, corpus, config, preset
        self.echo, self.process_group, self.callbacks = echo, process_group, list(callbacks)
        self._retry, self._show_progress, self._draw_curve = retry, show_progress, draw_curve
        self._report_scored: Callable[[int, int], object] = lambda scored, total: None
        data, finetune, training = config.data, config.finetune, config.optimizer
        self._check_process_group()
        instructions = process_group.bfloat16_instructions()
        precision, self.precision_reason = resolve_precision(training.precision, instructions)
        torch.manual_seed(training.seed)
        model_config = dataclasses.replace(model_config, vocab_size=corpus.tokenizer.vocab_size)
        if training.sampled_softmax >= model_config.vocab_size:
            raise InputError(
                f"sampled_softmax must be < the vocabulary of {model_config.vocab_size:,} tokens; "
                f"got {training.sampled_softmax:,}"
            )
        self.model = Model(model_config, process_group.shard_layer)
        process_group.shard_model(self.model)
        self._set_precision(precision)
        self.model.activation_checkpointing = training.activation_checkpointing
        self.model.sparse_gradients = not process_group.sharded  # FSDP sums dense ones only
        if training.activation_checkpointing:
            malloc.return_large_blocks()
        if finetune.lora_rank:
            apply_lora(self.model, finetune.lora_rank, finetune.lora_alpha)
        freeze_parameters(self.model, finetune.freeze)
        self.loader: WindowLoader | MixtureLoader | ConversationLoader | ReplayLoader
        if corpus.train.answers is not None:
            self.loader = ConversationLoader(
                corpus.train.tokens,
                corpus.train.doc_offsets,
                corpus.train.answers,
                data.batch_size,
                data.seq_len,
                training.seed,
            )
        else:
            self.loader = make_loader(
                corpus.train.tokens,
                corpus.mixture_streams,
                data.batch_size,
                data.seq_len,
                training.seed,
                carry=data.state == "carry",
                names=corpus.mixture_names,
            )
        self.fingerprints = corpus.identity
        """What identifies the texts that are trained on. A run continues with the same only."""
        if finetune.replay_fraction:
            self._add_replay()
        self._teachers: Teachers | None = None
        self._predictions: np.ndarray | None = None
        """(n, V) float16, the teachers' prediction after each token of the text; None if it is too
        large, and they are asked for each batch."""
        if config.distillation.teachers:
            self._add_teachers()
        if corpus.val.answers is None and corpus.val.n_tokens <= data.seq_len:
            raise InputError(
                f"the validation split must hold one window of {data.seq_len + 1} tokens; it has "
                f"{corpus.val.n_tokens}: use more text or a smaller seq_len"
            )
        self.replicas = Replicas(
            replica_count(self.model, data.batch_size // process_group.size, process_group)
        )
        self.optimizer = build_optimizer(
            self.model,
            training,
            layerwise_lr_decay=finetune.layerwise_lr_decay,
            newton_schulz_dtype=fastest_dtype(instructions),
            run_tasks=self.replicas.run,
            process_group=process_group,
        )
        self.average = WeightAverage(self.model, training.ema_decay, process_group)
        """The average of the weights, which takes their place in validation and in use."""
        self.recurrent_state: State | None = None
        """What this process's rows of the next batch continue from, with state ``carry``."""
        self._recurrent_state_before: State | None = None
        token_bytes = corpus.tokenizer.token_bytes
        sizes = [len(token_bytes(i)) for i in range(corpus.tokenizer.vocab_size)]
        eval_tokens = config.evaluation.eval_tokens
        self.subset = evenly_spaced_sample(corpus.val.tokens, eval_tokens, EVALUATION_STREAMS)
        """Tokens (n,) of the fixed validation subset."""
        self.subset_answers: np.ndarray | None = None
        """(n,) bool, which of them count; None if all do."""
        scored = self.subset
        if corpus.val.answers is not None:
            self.subset_answers = evenly_spaced_sample(
                corpus.val.answers, eval_tokens, EVALUATION_STREAMS
            )
            scored = self.subset[self.subset_answers]
            if not len(scored):
                raise InputError(
                    f"eval_tokens must reach an answer of the validation split; got {eval_tokens}"
                )
        self.subset_bytes = max(1, sum(sizes[t] for t in scored.tolist()))
        self.progress = Progress()
        self.scores: Evaluation | None = None
        """The newest scores on the validation subset."""
        self.newer_best: tuple[float, int] | None = None
        """Loss and step of a best model of a later step; see ``_find_newer_best``."""
        self.rng_state = torch.get_rng_state()
        """Torch's random state before the newest step."""
        agree = process_group.all_reduce_max if process_group.size > 1 else None
        self.stop_signal = StopSignal(agree)
        self._stop_requested = False
        self._seconds_left = 0.0
        """Seconds from the newest step to the end of a run that trains until a moment."""
        self._step_seconds = 0.0
        """What a step took before the first one of the run."""
        self._frozen_tokens = 0
        """So many rows of the embedding are frozen while those of new tokens learn."""
        self.metrics: MetricsLog = NullMetricsLog()
        self.samples: SampleLog | None = None
        self._sampler: Sampler | None = None
        if config.evaluation.sample_tokens:
            self._sampler = Sampler(corpus, config.evaluation, training.seed)

    def _check_process_group(self) -> None:
        size, config = self.process_group.size, self.config
        if config.data.batch_size % size:
            raise InputError(
                f"batch_size must be a multiple of the {size} processes that share its rows; got "
                f"{config.data.batch_size}"
            )
        if config.finetune.initialize_from and self.process_group.sharded:
            raise InputError(
                "--initialize-from starts with --parallel ddp or in one process; then continue "
                "with --resume --parallel fsdp"
            )
        if config.finetune.lora_rank and size > 1:
            raise InputError(f"lora_rank needs a single process; there are {size}")
        if config.distillation.teachers and size > 1:
            raise InputError(f"teachers need a single process; there are {size}")
        if self.callbacks and size > 1:
            # a stop that one process requests alone would leave the others waiting for it
            raise InputError(f"callbacks need a single process; there are {size}")

    def _add_replay(self) -> None:
        """Mix windows of an earlier text into the batches."""
        data, finetune = self.config.data, self.config.finetune
        earlier = open_corpus(finetune.replay_data, self.corpus.tokenizer)
        self.fingerprints["replay_fingerprint"] = earlier.info["fingerprint"]
        earlier_loader = WindowLoader(
            earlier.train.tokens,
            data.batch_size,
            data.seq_len,
            self.config.optimizer.seed,
            name=f"the earlier text {earlier.info['source']}",
        )
        assert not isinstance(self.loader, ReplayLoader)
        self.loader = ReplayLoader(self.loader, earlier_loader, finetune.replay_fraction)

    def _add_teachers(self) -> None:
        """Load the models that this one learns from."""
        if self.corpus.train.answers is not None:
            raise InputError("teachers teach a text; got conversations: leave out --teachers")
        names, tokenizer = self.config.distillation.teachers, self.corpus.tokenizer
        self._teachers = Teachers.load(names, tokenizer, self.config.optimizer.precision)
        self.fingerprints["teachers_fingerprint"] = self._teachers.fingerprint()

    def _precompute_predictions(self) -> None:
        """Let the teachers read a text that is small enough for all of their predictions."""
        tokens, teachers = self.corpus.train.tokens, self._teachers
        if teachers is None or not isinstance(self.loader, WindowLoader):
            return
        if self._predictions is not None or teachers.table_bytes(len(tokens)) > MAX_TABLE_BYTES:
            return
        start = time.perf_counter()
        with progress_bar(len(tokens), "teachers read", "token") as bar:

            def on_window(count: int) -> None:
                self.stop_signal.raise_if_set()
                bar.update(count)

            end_of_text = self.corpus.tokenizer.eot if self.resets_at_documents else None
            self._predictions = teachers.predict_text(tokens, end_of_text, self.replicas, on_window)
        seconds = time.perf_counter() - start
        self.echo(
            f"teach   the teachers have read the text once, in {seconds:.1f} s, which do not count "
            "as training"
        )

    def train_new_tokens(self) -> None:
        """Let the embeddings of new tokens learn where LoRA or ``freeze`` has frozen the embedding.

        Raises:
            InputError: the embedding is sharded over processes.
        """
        count, embedding = self.progress.first_new_token, self.model.embedding
        if not count or embedding.requires_grad:
            return
        if self.process_group.sharded:
            raise InputError(
                "embeddings of new characters beside frozen ones learn in one process or with "
                "--parallel ddp; got fsdp"
            )
        self._frozen_tokens = count
        embedding.requires_grad_(True)
        for moment in ("exp_avg", "exp_avg_sq"):  # else what is frozen would move on
            if moment in self.optimizer.state[embedding]:
                self.optimizer.state[embedding][moment][:count] = 0

    def _set_precision(self, precision: str) -> None:
        """Resolve ``auto`` for good, so that a resume on another machine keeps it."""
        self.config = self.config.replace(precision=precision)
        self.model.set_precision(precision)

    # ---- length and position of a run

    @property
    def batch_tokens(self) -> int:
        """Tokens of one batch."""
        return self.config.data.batch_size * self.config.data.seq_len

    @property
    def batches_per_step(self) -> int:
        """Batches of an optimizer step; the last one of a length in epochs may have fewer."""
        return self.config.optimizer.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step; the last one of a length in epochs may have fewer."""
        return self.batch_tokens * self.batches_per_step

    @property
    def total_steps(self) -> int | None:
        """Length of the run in steps; None if the time sets it."""
        length, per_epoch = self.config.length, self.loader.batches_per_epoch
        if length.minutes is not None or length.until is not None:
            return None
        if length.epochs is not None:
            batches = self.progress.batches_of(length.epochs, per_epoch)
            return cdiv(batches + self.progress.missing_batches, self.batches_per_step)
        p = self.progress
        readable = p.earlier_batches + (DEFAULT_EPOCHS - p.earlier_epochs) * per_epoch
        epochs = int(readable) // self.batches_per_step
        default = max(MIN_DEFAULT_STEPS, min(DEFAULT_TOKENS // self.tokens_per_step, epochs))
        return length.steps or default

    def batches_until(self, step: int) -> int:
        """Batches that the run has read after so many steps, or will have read."""
        batches, epochs = step * self.batches_per_step, self.config.length.epochs
        batches -= self.progress.missing_batches
        if step > self.progress.step and epochs is not None:
            whole = self.progress.batches_of(epochs, self.loader.batches_per_epoch)
            return max(self.batches_until(self.progress.step), min(batches, whole))
        return batches

    @property
    def next_batches(self) -> int:
        """Batches of the next step."""
        step = self.progress.step
        return max(1, self.batches_until(step + 1) - self.batches_until(step))

    @property
    def tokens_trained(self) -> int:
        """Tokens that the steps so far were trained on."""
        return self.batches_until(self.progress.step) * self.batch_tokens

    def epochs_until(self, step: int) -> float:
        """Passes over the training split after so many steps."""
        return self.progress.epochs_after(self.batches_until(step), self.loader.batches_per_epoch)

    def fraction_done(self, steps_ahead: float = 0.0) -> float:
        """How much of the run is done, 0 to 1, or will be ``steps_ahead`` steps from now."""
        p, length = self.progress, self.config.length
        if self.total_steps is not None:
            return min(1.0, (p.step + steps_ahead) / self.total_steps)
        seconds = p.seconds * (1 + steps_ahead / max(1, p.step))
        if length.minutes is not None:
            return min(1.0, seconds / (60 * length.minutes))
        return min(1.0, seconds / max(1e-9, p.seconds + self._seconds_left))

    def lr_share(self) -> float:
        """The learning rates of the next step, as a share of their peaks."""
        c = self.config.optimizer
        factor = lr_factor(
            self.fraction_done(0.5), c.warmup, c.schedule, c.final_lr_ratio, c.decay_fraction
        )
        return factor * self.progress.lr_scale

    def seconds_left(self, steps_per_second: float) -> float:
        """Seconds to the end of the run, about.

        Args:
            steps_per_second: the speed.
        """
        p, length = self.progress, self.config.length
        if self.total_steps is not None:
            return max(0, self.total_steps - p.step) / steps_per_second
        if length.minutes is not None:
            return max(0.0, 60 * length.minutes - p.seconds)
        return self._seconds_left

    def _read_clock(self) -> None:
        """Note how long it is until the moment that ends the run, the same in all processes."""
        if (until := self.config.length.until) is not None:
            self._seconds_left = max(0.0, self.process_group.all_reduce_max(seconds_until(until)))

    @property
    def resets_at_documents(self) -> bool:
        """Whether the recurrent state is reset at each document start; for conversations always."""
        return self.config.data.state != "window" or self.corpus.train.answers is not None

    @property
    def patience_exceeded(self) -> bool:
        """Whether the validation loss has not improved for too long."""
        return 0 < self.config.evaluation.patience <= self.progress.evals_since_best

    # ---- a run from start to end

    def fit(self, *, resume: bool = False, lock: FolderLock | None = None) -> dict[str, Any]:
        """Train to the end and return the summary.

        The first SIGINT, SIGTERM or SIGHUP finishes the step, saves ``last.h5`` and ends the run
        with ``ended: signal``. A second one ends the process at once.

        Args:
            resume: continue from the newest checkpoint of the run folder, or from the start if the
                run ended before its first checkpoint.
            lock: the lock of the run folder, if the caller holds it already.

        Returns:
            The contents of ``summary.json``.

        Raises:
            RunLockedError: another process writes in the folder.
            TrainingDivergedError: a loss or gradient is not finite, and ``on_nan`` does not let the
                run continue. ``last.h5`` is the state before that step, unless that state is what
                diverged.
            StorageError: a checkpoint could not be written; earlier ones are intact.
        """
        is_first = self.process_group.rank == 0  # of several processes, rank 0 writes
        held = (lock or FolderLock(self.run_dir)) if is_first else contextlib.nullcontext()
        with held, self.stop_signal:
            torch.set_rng_state(self.rng_state)  # whatever was drawn since __init__
            self._read_clock()
            if resume:
                self._resume()
            elif self.config.finetune.initialize_from:
                # before anything exists that could be resumed without the initial weights
                self.save("step-0.h5", resumable=True)
                if self.process_group.size > 1:
                    self.restore(self.run_dir / "step-0.h5")  # rank 0 alone has these weights
            if is_first:
                if self.corpus.documents:
                    self.corpus.documents.save(self.run_dir / DOCUMENTS_FILE)
                text = CONFIG_MARK + config_to_toml(self.model.config, self.config, self.preset)
                atomic_write_text(self.run_dir / "config.toml", text)
                self.metrics = MetricsLog(
                    self.run_dir,
                    self.progress if resume else None,
                    retry=self._retry,
                    draw_curve=self._draw_curve,
                    warn=lambda line: self.echo(line),
                )
                if self._sampler is not None:
                    resumed_step = self.progress.step if resume else None
                    self.samples = SampleLog(self.run_dir, resumed_step, self._retry)
            try:
                for callback in self.callbacks:
                    callback.on_start(self)
                ended = self._run()
            finally:
                self.metrics.close()
                if self.samples is not None:
                    self.samples.close()
            summary = self._write_summary(ended)
        if is_first and self.config.output.html:
            self._write_report()
        for callback in self.callbacks:
            callback.on_end(self, summary)
        return summary

    def _run(self) -> str:
        """Train to the end of the budget; return why it ended: done, early, stopped or signal."""
        self.model.train()
        echo, ended = self.echo, "signal"
        try:
            self._precompute_predictions()
            self.log_run_summary()
            self._start_replica_processes()
            if self.config.evaluation.on_nan == "rollback" and not self._has_checkpoint():
                self.save_resumable("step-0.h5")
            with StatusReporter(
                self.run_dir if self.process_group.rank == 0 else None,
                self.total_steps,
                self.progress.step,
                self.seconds_left,
                echo=echo,
                show=self._show_progress,
            ) as reporter:
                self.echo, self._report_scored = reporter.echo, reporter.score
                self._train_loop(reporter)
                is_over = self.patience_exceeded or self.fraction_done() >= 1.0
                if self.stop_signal.signal_number:
                    ended = "signal"
                elif self._stop_requested and not is_over:
                    ended = "stopped"  # in the middle of an epoch, which a resume continues
                else:
                    self.end_epoch()
                    ended = "early" if self.patience_exceeded else "done"
        except InterruptedTrainingError:
            pass
        finally:
            self.echo = echo
            self.replicas.end_processes()
        self.save_resumable("last.h5")
        self._prune_checkpoints(self.config.evaluation.keep_checkpoints)
        return ended

    def _start_replica_processes(self) -> None:
        """Let processes take the place of threads, where they can and it is worth their start.

        They know the model as it is now, with its weights as they will be.
        """
        choice, data = self.config.optimizer.replicas, self.config.data
        asks_teachers = self._teachers is not None and self._predictions is None
        if choice == "threads" or self.process_group.size > 1 or asks_teachers:
            return
        if choice == "auto":
            memory, processes = memory_bytes(), self.replicas.count - 1
            has_room = memory is None or processes * MEMORY_BYTES < MAX_SHARE_OF_MEMORY * memory
            # a callback of the user may change the model
            are_own = all(type(c).__module__.startswith("mmrec.") for c in self.callbacks)
            seconds = self.seconds_left(1 / self._step_seconds)
            if seconds < MIN_SECONDS_FOR_PROCESSES or not are_own or not has_room:
                return
        try:
            self.replicas.start_processes(
                self.model,
                data.batch_size,
                data.seq_len,
                lambda line: self.echo(line),
                wait=choice == "processes",
            )
        except (OSError, pickle.PicklingError) as error:
            self.echo(f"note    threads compute the gradients, no processes: {error}")

    def _train_loop(self, reporter: StatusReporter) -> None:
        """Take steps, and do what is due after them, until something ends the run."""
        evaluation = self.config.evaluation
        while True:
            p = self.progress
            self._read_clock()
            try:
                self.run_due_events()
                if p.step and p.step % evaluation.save_every == 0:
                    self.save_resumable(f"step-{p.step}.h5")
                    # one is needed until the end, whatever the user keeps
                    self._prune_checkpoints(max(1, evaluation.keep_checkpoints))
                if self._should_stop():
                    return
                start = time.perf_counter()
                loss, grad_norm, lr = self.train_step()
            except TrainingDivergedError as error:
                self._handle_divergence(error)
                continue
            batches = self.next_batches
            p.missing_batches += self.batches_per_step - batches
            p.step, p.consecutive_skips = p.step + 1, 0
            seconds = self.process_group.all_reduce_max(time.perf_counter() - start)
            p.seconds += seconds
            p.add_loss(loss)
            self.metrics.write("train", p.step, loss=loss, lr=lr, grad_norm=grad_norm)
            self._warn_on_spike()
            tokens = batches * self.batch_tokens
            rate = tokens / seconds
            reporter.step(p.step, p.seconds, loss=loss, lr=lr, tokens=tokens, rate=rate)
            for callback in self.callbacks:
                values = {"step": p.step, "loss": loss, "lr": lr, "grad_norm": grad_norm}
                callback.on_step(self, values | {"tokens_per_second": rate})

    def _should_stop(self) -> bool:
        return (
            self.stop_signal.is_set()
            or self._stop_requested
            or self.patience_exceeded
            or self.fraction_done() >= 1.0
        )

    def request_stop(self) -> None:
        """End the run after the current step, with a checkpoint; for callbacks."""
        self._stop_requested = True

    def log_metrics(self, **values: float | str) -> None:
        """Add a line of kind ``callback`` to ``metrics.jsonl``; for callbacks.

        Args:
            values: numbers or strings by name. ``kind`` and ``step`` are names of the line itself.

        Raises:
            InputError: a name is taken, or a value is neither a number nor a string.
            StorageError: the line could not be written.
        """
        for name, value in values.items():
            if name in ("kind", "step"):
                raise InputError(f"a metric must not be called kind or step; got {name!r}")
            if not isinstance(value, int | float | str):
                raise InputError(f"metric {name} must be a number or a string; got {value!r}")
        self.metrics.write("callback", self.progress.step, **values)

    # ---- one step

    def train_step(self) -> tuple[float, float, float]:
        """Take one optimizer step.

        Returns:
            Loss (nats per token), gradient norm before clipping, and AdamW's learning rate.

        Raises:
            TrainingDivergedError: the loss or the gradient is not finite; the weights are as
                before.
        """
        p, factor = self.progress, self.lr_share()
        self.optimizer.scale_lr(factor)
        self.optimizer.zero_grad(set_to_none=True)
        self.rng_state = torch.get_rng_state()
        self._recurrent_state_before = self.recurrent_state
        loss = self.compute_gradients(p.step + p.data_offset)
        [grad_norm] = map(float, self.replicas.run([self._clip_gradients]))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            culprit = f"gradient norm {grad_norm}" if math.isfinite(loss) else f"loss {loss}"
            raise TrainingDivergedError(f"{culprit} at step {p.step + 1}")
        self.optimizer.step()
        self.replicas.run(self.average.update_tasks(p.step, self.replicas.count))
        return loss, grad_norm, self.config.optimizer.lr * factor

    def compute_gradients(self, data_step: int) -> float:
        """Set the gradients of one step's data, summed over all processes.

        Args:
            data_step: the step whose batches are used, counted from 0.

        Returns:
            The mean loss over all targets of all batches and processes, in nats per token.
        """
        group, batches = self.process_group, self.next_batches
        first = data_step * self.batches_per_step - self.progress.missing_batches
        first = max(0, first - self.progress.earlier_batches)  # of the text as it is now
        total = 0.0
        end_of_text = self.corpus.tokenizer.eot if self.resets_at_documents else None
        compute_loss: Callable[..., tuple[Tensor, State]] = Model.loss
        loss_options: dict[str, Any] = {}
        if sampled_softmax := self.config.optimizer.sampled_softmax:
            loss_options["sampled_softmax"] = sampled_softmax
        if self._teachers:
            compute_loss = distillation_loss
            loss_options["weight"] = self.config.distillation.teacher_weight
            if self._predictions is None:
                loss_options["teachers"] = self._teachers
        loaded = [self.loader.batch_at(batch) for batch in range(first, first + batches)]
        all_targets = sum(count_targets(targets) for _, targets in loaded)
        for batch, (tokens, targets) in enumerate(loaded, first):
            own_targets = targets.tensor_split(group.size)[group.rank]
            counted = count_targets(own_targets)
            # all tokens of a text count: then this is the number of parts, a whole number
            count = all_targets / counted if counted else math.inf
            if self.config.data.state != "carry" or self.loader.starts_epoch(batch):
                self.recurrent_state = None
            soft_targets = None
            if self._predictions is not None:
                assert isinstance(self.loader, WindowLoader)
                places = self.loader.window_starts(batch)[:, None] + np.arange(tokens.shape[1])
                soft_targets = torch.from_numpy(self._predictions[places]).float()
            loss, self.recurrent_state = forward_backward(
                self.model,
                self.replicas,
                tokens.tensor_split(group.size)[group.rank],
                own_targets,
                1 / count,
                state=self.recurrent_state,
                end_of_text=end_of_text,
                process_group=group,
                compute_loss=compute_loss,
                loss_options=loss_options,
                soft_targets=soft_targets,
            )
            total += loss / count
        if self._frozen_tokens:
            assert self.model.embedding.grad is not None
            self.model.embedding.grad[: self._frozen_tokens] = 0
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return group.all_reduce_gradients(total, gradients)

    def _clip_gradients(self) -> Tensor:
        max_norm = self.config.optimizer.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(clipped_parameters(self.model), max_norm)
        return self.process_group.full_tensor(norm)

    # ---- validation, epochs and divergence

    def run_due_events(self) -> None:
        """Validate and end the epoch if that is due.

        A resumed run calls this first: a signal may have interrupted what was due at its step.
        """
        p = self.progress
        at_interval = p.step % self.config.evaluation.eval_every == 0
        is_due = p.step > 0 and (at_interval or self.fraction_done() >= 1.0)
        if is_due and not (p.validations and p.validations[-1]["step"] == p.step):
            self.validate()
        if int(self.epochs_until(p.step)) > int(self.epochs_until(max(0, p.step - 1))):
            self.end_epoch()

    def validate(self) -> None:
        """Score the fixed validation subset; keep the best model.

        With ``ema_decay`` the model holds the average of its weights meanwhile, for callbacks, too.

        Raises:
            WeightsDivergedError: the validation loss is not finite.
        """
        with self.average.swapped():
            self._validate()

    def _validate(self) -> None:
        p = self.progress
        scores = self._score(self.subset, self.subset_bytes, self.subset_answers)
        if not math.isfinite(scores.loss):
            raise WeightsDivergedError(f"validation loss {scores.loss} at step {p.step}")
        self.scores = scores
        train_loss = sum(p.losses_since_validation) / max(1, len(p.losses_since_validation))
        p.losses_since_validation = []
        p.validations.append({"step": p.step, "val": scores.loss, "train": train_loss})
        self.metrics.write("val", p.step, loss=scores.loss, bits_per_byte=scores.bits_per_byte)
        if p.best_loss is None or scores.loss < p.best_loss:
            p.best_loss, p.best_step, p.evals_since_best = scores.loss, p.step, 0
            if self.newer_best is None or scores.loss <= self.newer_best[0]:
                self.save("best.h5", resumable=False)
                self.newer_best = None
        else:
            p.evals_since_best += 1
        warning = overfitting_warning(p.validations)
        if warning:
            self.echo(warning)
        for callback in self.callbacks:
            callback.on_validation(self, scores)
        self._write_sample(scores.loss)

    def _write_sample(self, loss: float) -> None:
        """Let the model write a text, in one process, if it has whole weights.

        Args:
            loss: the validation loss.
        """
        group, p = self.process_group, self.progress
        if self.samples is None or self._sampler is None or group.rank or group.sharded:
            return
        sample = {
            "step": p.step,
            "tokens": self.tokens_trained,
            "seconds": round(p.seconds, 1),
            "prompt": self._sampler.prompt,
            "text": self._sampler.write(self.model),
            "seed": self.config.optimizer.seed,
        }
        self.samples.write(sample)
        for line in describe_sample(sample, loss):
            self.echo(line)
        for callback in self.callbacks:
            callback.on_sample(self, sample)

    def end_epoch(self) -> None:
        """Score the whole validation split and add a row to the table of epochs.

        The row's number is how many epochs were trained on. It is no whole number if the run ends
        within an epoch, or if a step goes on in the next one.
        """
        p, epoch = self.progress, self.progress.current_epoch
        if not epoch:
            return
        val = self.corpus.val
        scores = self._score(val.tokens, val.n_bytes, val.answers)
        number = round(self.epochs_until(p.step), 4)
        row = {
            "epoch": int(number) if number == int(number) else number,
            "mean_loss": epoch["sum"] / epoch["count"],
            "first_loss": epoch["first"],
            "last_loss": epoch["last"],
            "val_loss": scores.loss,
            "perplexity": scores.perplexity,
            "bits_per_byte": scores.bits_per_byte,
            "accuracy": scores.accuracy,
        }
        self.metrics.write("epoch", p.step, **row)
        row["seconds"] = p.seconds - epoch["began"]
        p.epochs.append(row)
        p.current_epoch = {}
        if len(p.epochs) == 1:
            self.echo(EPOCH_HEADER)
        self.echo(epoch_row(row))

    def _score(self, tokens: np.ndarray, n_bytes: int, answers: np.ndarray | None) -> Evaluation:
        """Score tokens (n,) of the validation split, or those of ``answers`` (n,) among them.

        All processes score all tokens, since a sharded layer is assembled in all of them or in
        none. The scores of rank 0 count.
        """
        scored = 0

        def report(count: int) -> None:
            nonlocal scored
            self.stop_signal.raise_if_set()
            scored += count
            self._report_scored(scored, len(tokens))

        with self.average.swapped():
            try:
                scores = evaluate(
                    self.model,
                    tokens,
                    self.corpus.tokenizer.eot,
                    n_bytes,
                    answers=answers,
                    reset_at_documents=self.resets_at_documents,
                    progress=report,
                )
            finally:
                self.process_group.reshard(self.model)
        return self.process_group.broadcast_object(scores)

    def _warn_on_spike(self) -> None:
        """Warn of a loss spike, unless the last warning is recent."""
        p = self.progress
        if p.last_spike_step and p.step - p.last_spike_step < divergence.STEPS_BETWEEN_WARNINGS:
            return
        losses = self.metrics.last_losses(divergence.SPIKE_WINDOW + 1)
        median = divergence.loss_spike(losses)
        if median is not None:
            p.last_spike_step = p.step
            self.echo(
                f"spike: loss {losses[-1]:.3f} at step {p.step:,}, its running median is "
                f"{median:.3f}; if it does not fall again, a lower --lr and --matrix-lr help"
            )

    def _handle_divergence(self, error: TrainingDivergedError) -> None:
        """Skip the step or roll back, as ``on_nan`` says; or save the state before it and raise."""
        p, policy = self.progress, self.config.evaluation.on_nan
        self.recurrent_state = self._recurrent_state_before  # the step's own may not be finite
        limit = divergence.limit_reached(policy, p.consecutive_skips, p.skipped_steps, p.rollbacks)
        weights_are_lost = isinstance(error, WeightsDivergedError)
        if policy == "stop" or limit or (policy == "skip" and weights_are_lost):
            torch.set_rng_state(self.rng_state)  # a resume takes the same step again
            message = f"{error}{f' {limit}' if limit else ''}"
            if not weights_are_lost and self._has_diverged():
                weights_are_lost = True
                message += ", and on the first text too: the weights have diverged"
            if weights_are_lost:
                raise WeightsDivergedError(message)
            self.save_resumable("last.h5")
            raise TrainingDivergedError(message)
        if policy == "skip":
            p.data_offset += 1
            p.skipped_steps += 1
            p.consecutive_skips += 1
            self.echo(f"skipped: {error}; the step is left out, as --on-nan says")
        else:
            self._load_latest()
            restored, self.progress.seconds = self.progress, p.seconds
            restored.data_offset = p.step + p.data_offset + 1 - restored.step
            restored.lr_scale = p.lr_scale * divergence.ROLLBACK_LR_SCALE
            restored.rollbacks = p.rollbacks + 1
            self.metrics.rewind(restored.metrics_lines)
            if self.samples is not None:
                self.samples.rewind(restored.step)
            for callback in self.callbacks:
                callback.on_rollback(self)
            self.echo(
                f"rollback: {error}; back to step {restored.step:,}, with other data and "
                f"{restored.lr_scale:g} of the learning rates"
            )
        self.metrics.write(policy, self.progress.step, reason=str(error))

    def _has_diverged(self) -> bool:
        """Whether the weights, though finite, give no finite gradient on the first step's data.

        The run stays as it was.
        """
        rng_state, recurrent_state = torch.get_rng_state(), self.recurrent_state
        self.optimizer.zero_grad(set_to_none=True)
        try:
            loss = self.compute_gradients(0)
            [grad_norm] = map(float, self.replicas.run([self._clip_gradients]))
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            torch.set_rng_state(rng_state)
            self.recurrent_state = recurrent_state
        return not (math.isfinite(loss) and math.isfinite(grad_norm))

    # ---- messages and the summary

    def log_run_summary(self) -> None:
        """Print the model, the data and the expected time, after timing a few steps."""
        length, train, val = self.config.length, self.corpus.train, self.corpus.val
        parameters = list(self.model.parameters())
        count = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        trained -= self._frozen_tokens * self.model.config.width
        trained_text = "" if trained == count else f", {trained / 1e6:.2f} M of them trained"
        precision, muon = self.config.optimizer.precision, self._environment()["newton_schulz"]
        muon_text = "" if muon == precision else f", Muon in {muon}"
        self.echo(
            f"model   {self.preset}: {count / 1e6:.2f} M parameters{trained_text}, "
            f"{precision} ({self.precision_reason}){muon_text}"
        )
        self.echo(
            f"data    {self.corpus.info['source']}: {train.n_tokens:,} training tokens, "
            f"{val.n_tokens:,} validation tokens"
        )
        if self._teachers:
            count, weight = len(self._teachers.models), self.config.distillation.teacher_weight
            self.echo(
                f"teach   the training loss compares with the mean prediction of {count} "
                f"model{'s' * (count > 1)}"
                + (f", and for {1 - weight:g} of it with the text" if weight < 1 else "")
            )
        if self.average.decay:
            self.echo(
                f"average the weights of about {1 / (1 - self.average.decay):.3g} steps, which "
                "are validated and saved for use"
            )
        compile_seconds, step_seconds = self._time_steps()
        self._step_seconds = step_seconds
        rate = self.next_batches * self.batch_tokens / step_seconds
        if length.minutes is not None:
            steps = max(1, int(60 * length.minutes / step_seconds))
            length_text = f"{length.minutes:.6g} min of training, about {_count_steps(steps)}"
        elif length.until is not None:
            self._read_clock()
            steps = self.progress.step + max(1, int(self._seconds_left / step_seconds))
            length_text = f"until {length.until}, about {_count_steps(steps)}"
        else:
            assert self.total_steps is not None
            steps, length_text = self.total_steps, _count_steps(self.total_steps)
        steps_left = max(0, steps - self.progress.step)
        epochs, tokens = self.epochs_until(steps), self.batches_until(steps) * self.batch_tokens
        scored = steps / self.config.evaluation.eval_every * len(self.subset)
        scored += math.ceil(epochs) * val.n_tokens  # each scores the whole split
        # scoring a token takes about half the time of training on it
        seconds_left = steps_left * step_seconds
        seconds_left += scored / (2 * rate) * steps_left / max(1, steps)
        if length.until is not None:
            seconds_left = self._seconds_left
        is_short = tokens < steps * self.tokens_per_step
        self.echo(
            f"budget  {length_text} of {'up to ' * is_short}{self.tokens_per_step:,} tokens = "
            f"{format_tokens(tokens)}, {epochs:.2f} epochs"
        )
        for line in self._describe_epochs(steps, epochs):
            self.echo(line)
        if self._sampler is not None:
            self.echo(
                "note    no text is written at validations: each process has a part of the weights"
                if self.process_group.sharded
                else describe_prompt(self._sampler.prompt)
            )
        self.echo(
            f"time    about {format_duration(seconds_left)} at {rate:,.0f} tokens/s "
            f"(kernels ready after {compile_seconds:.0f} s); run folder {self.run_dir}"
        )

    def _describe_epochs(self, steps: int, epochs: float) -> Iterator[str]:
        """Notes on what the epochs of the run are, and on what so many of them do to a model."""
        read, per_epoch = [("its text", epochs)], self.loader.batches_per_epoch
        new_tokens = per_epoch * self.batch_tokens
        fraction = self.config.finetune.replay_fraction
        if fraction:
            new_tokens *= 1 - fraction
            yield (
                f"note    {fraction:g} of the windows are earlier text; an epoch is one pass over "
                "the new text"
            )
        if isinstance(self.loader, MixtureLoader):
            passes = self.loader.passes(self.batches_until(steps))
            read = list(zip(self.corpus.mixture_names, passes, strict=True))
            listed = ", ".join(f"{name} {count:.2f} times" for name, count in read)
            yield (
                "note    an epoch is as many tokens as all sources have; the run reads about "
                f"{listed}"
            )
        if isinstance(self.loader, ConversationLoader):
            yield from self._describe_conversations(self.loader)
        if new_tokens < MIN_READ_SHARE * self.corpus.train.n_tokens:
            yield (
                f"note    an epoch reads {round(new_tokens):,} of the "
                f"{self.corpus.train.n_tokens:,} training tokens, not always the same ones: the "
                "rest fills no batch"
            )
        if self.batches_per_step > per_epoch:
            yield (
                f"note    gradient_accumulation_steps {self.batches_per_step:,} is more than the "
                f"{per_epoch:.4g} batches of an epoch: a step reads the text "
                f"{min(self.batches_until(steps), self.batches_per_step) / per_epoch:.2f} times"
            )
        name, count = max(read, key=lambda source: source[1])
        # what a student learns is not the text, and is not memorised
        if count > DEFAULT_EPOCHS and not self.model.config.dropout and not self._teachers:
            dropout = "0.2" if self.corpus.tokenizer.kind == "bpe" else "0.1"
            limit, advice = DEFAULT_EPOCHS, f"--dropout {dropout} helps"
            if count > MANY_EPOCHS:
                limit = MANY_EPOCHS
                advice = "--dropout 0.2 and --weight-decay 1 help, and mmrec distill does more"
            yield f"note    in more than {limit} epochs a model memorises {name}: {advice}"

    def _describe_conversations(self, loader: ConversationLoader) -> Iterator[str]:
        """Notes on how conversations fill the windows, and on those that do not fit."""
        yield (
            f"note    answers alone are learnt; conversations fill {loader.fill:.0%} of the windows"
        )
        if loader.cut:
            longest = int(np.diff(self.corpus.train.doc_offsets).max()) - 1
            place = next((entry["name"] for entry in self.corpus.info["longest"]), "")
            yield (
                f"note    conversations longer than seq_len {loader.seq_len:,}, which are cut "
                f"there: {loader.cut:,}, {loader.left_out:,} of them before their first answer and "
                f"left out; the longest, {place}, has {longest:,} tokens"
            )

    def _time_steps(self) -> tuple[float, float]:
        """Compile the kernels and time the gradients of a few steps. The run stays as it was.

        Returns:
            Seconds of the first, compiling pass, and seconds that a step will take.
        """
        rng_state, recurrent_state, times = torch.get_rng_state(), self.recurrent_state, []
        try:
            for _ in range(4):
                start = time.perf_counter()
                self.compute_gradients(0)
                self.model.zero_grad(set_to_none=True)
                times.append(time.perf_counter() - start)
                self.stop_signal.raise_if_set()
        finally:
            torch.set_rng_state(rng_state)
            self.recurrent_state = recurrent_state
        return times[0], sorted(times[1:])[1] * 1.2  # the optimizer takes a sixth of a step

    def _write_summary(self, ended: str) -> dict[str, Any]:
        """Write ``summary.json``, and return its contents.

        Args:
            ended: why the run ended, as ``_run`` returns it.
        """
        p = self.progress
        tokens = self.tokens_trained
        best_loss, best_step = self.newer_best or (p.best_loss, p.best_step)
        reason = ""
        if best_loss is not None:
            reason = explain_best_model(p.validations, best_loss, best_step)
        summary = {
            "ended": ended,
            "precision": self.config.optimizer.precision,
            "precision_reason": self.precision_reason,
            "newton_schulz": self._environment()["newton_schulz"],
            "steps": p.step,
            "tokens": tokens,
            "seconds": round(p.seconds, 1),
            "tokens_per_second": round(tokens / max(p.seconds, 1e-9)),
            "best_step": best_step,
            "best_val_loss": best_loss,
            "best_reason": reason,
            "skipped_steps": p.skipped_steps,
            "rollbacks": p.rollbacks,
            "epochs": p.epochs,
        }
        path, text = self.run_dir / "summary.json", json.dumps(summary, indent=1) + "\n"
        if self.process_group.rank == 0:
            write_with_retry(lambda: atomic_write_text(path, text), self._retry)
        return summary

    def _write_report(self) -> None:
        """Write ``report.html``. A failure is a warning: the run has ended well."""
        from mmrec.training.report import write_report

        try:
            write_report(self.run_dir, self.run_dir / REPORT_FILE, force=None)
        except InputError as error:
            self.echo(f"warning: {error}")

    # ---- saving and restoring

    def save_resumable(self, name: str) -> None:
        """Write a checkpoint to resume from.

        The metrics go to disk first, since the checkpoint stores how many lines there are.

        Args:
            name: file name.
        """
        self.progress.metrics_lines = self.metrics.sync()
        if self.samples is not None:
            self.samples.sync()
        self.save(name, resumable=True)

    def save(self, name: str, *, resumable: bool) -> None:
        """Write a checkpoint into the run folder.

        Args:
            name: file name.
            resumable: whether to store optimizer moments, random state, progress, recurrent state
                and, beside their average, the weights themselves too.

        Raises:
            WeightsDivergedError: a weight is not finite; nothing was written.
            StorageError: the file could not be written.
        """
        self._check_weights()
        with self.average.swapped():
            self._save(name, resumable=resumable)

    def _save(self, name: str, *, resumable: bool) -> None:
        group = self.process_group
        info = {
            "preset": self.preset,
            "train": dataclasses.asdict(self.config),
            "val": dataclasses.asdict(self.scores) if self.scores else None,
            "source": self.corpus.info["source"],
            "batches_per_epoch": self.loader.batches_per_epoch,
            "precision": self.config.optimizer.precision,
            **self.fingerprints,
            "environment": self._environment(),
        }
        training_state: dict[str, Any] = {}
        if resumable:
            state = self.recurrent_state if self.config.data.state == "carry" else None
            states = group.all_gather_object(state)
            training_state = {
                "optimizer": self.optimizer,
                "progress": dataclasses.asdict(self.progress),
                "recurrent_state": concat_states(states) if state else None,  # type: ignore[arg-type]
                "raw_weights": self.average.values,
            }
        path, step = self.run_dir / name, self.progress.step

        def write() -> None:
            save_checkpoint(
                path,
                self.model,
                self.corpus.tokenizer,
                step,
                info,
                **training_state,
                process_group=group,
            )

        def write_in_all_processes() -> None:
            group.broadcast_object(True)
            write()

        if group.rank == 0:
            write_with_retry(write_in_all_processes, self._retry)
            group.broadcast_object(False)
        else:  # as often as rank 0 tries
            while group.broadcast_object(False):
                write()
        if resumable:
            malloc.trim()
        for callback in self.callbacks:
            callback.on_checkpoint(self, path)

    def _check_weights(self) -> None:
        group, parameters = self.process_group, list(self.model.named_parameters())
        bad = (
            i
            for i, (_, p) in enumerate(parameters)
            if not _all_finite(group.local_shard(p.detach()))
        )
        first_bad = -group.all_reduce_max(-next(bad, math.inf))
        if first_bad < math.inf:
            name = parameters[int(first_bad)][0]
            raise WeightsDivergedError(f"weight {name} not finite at step {self.progress.step}")

    def restore(self, path: Path) -> dict[str, Any]:
        """Put the run into the state that a checkpoint holds.

        Args:
            path: the file. In a distributed run only rank 0 reads it.

        Returns:
            The metadata of the checkpoint.

        Raises:
            InputError: the file is damaged, holds no training state, or was saved while training on
                another text.
        """
        group, config = self.process_group, self.config
        is_first = group.rank == 0
        info = read_metadata(path)[1] if is_first else {}
        if is_first:
            check_same_text(info, self.fingerprints, config, path, self.corpus.earlier)
        state = None
        try:
            averages = self.average.values if self.average.decay else None
            progress = restore_training_state(path, self.model, self.optimizer, group, averages)
            if config.data.state == "carry" and is_first:
                state = read_recurrent_state(path, self.model.initial_state(config.data.batch_size))
        except InputError as error:
            if group.size > 1:  # the others have begun with this file: do not try an earlier one
                raise InputError(str(error)) from None
            raise
        self.progress = from_plain(Progress, progress)
        self.train_new_tokens()
        state = group.broadcast_object(state)
        self.recurrent_state = None
        if state is not None:
            self.recurrent_state = split_state(state, group.size)[group.rank]
        self._recurrent_state_before = None
        info = group.broadcast_object(info)
        if info["precision"] != self.config.optimizer.precision:
            self.precision_reason = "as the run began"
        self._set_precision(info["precision"])
        self.scores = from_plain(Evaluation, info["val"]) if info["val"] else None
        if not self._is_of_this_text(info):
            self.progress.begin_longer_text(self.batches_per_step, info["batches_per_epoch"])
            self.recurrent_state, self.scores = None, None
        self._find_newer_best()
        return info

    def _is_of_this_text(self, info: dict[str, Any]) -> bool:
        """Whether a checkpoint is of the text as it is now, and not from before it grew.

        Args:
            info: metadata of the checkpoint.
        """
        return bool(info["fingerprint"] == self.fingerprints["fingerprint"])

    def _find_newer_best(self) -> None:
        """Find out whether ``best.h5`` is of a later step than the run is at.

        A kill or a rollback leaves such a file behind. No worse model may replace it. A file from
        before text was added is scored once more, on the validation text as it is now.
        """
        p, best = self.progress, None
        with contextlib.suppress(InputError):  # no such file, or it cannot be read
            path = self.run_dir / "best.h5"
            step, info, _ = read_metadata(path)
            if step > p.step or p.best_loss is None:
                is_new = self._is_of_this_text(info)
                best = info["val"]["loss"] if is_new else self._score_checkpoint(path), step
        best = self.process_group.broadcast_object(best)
        self.newer_best = best if best and best[1] > p.step else None
        if best and not self.newer_best:  # text was added since
            p.best_loss, p.best_step = best

    def _score_checkpoint(self, path: Path) -> float:
        """The loss of an earlier model on the validation subset, as the text is now."""
        with torch.random.fork_rng(devices=[]):
            model = load_model(path).model
        model.set_precision(self.config.optimizer.precision)
        return evaluate(
            model,
            self.subset,
            self.corpus.tokenizer.eot,
            self.subset_bytes,
            answers=self.subset_answers,
            reset_at_documents=self.resets_at_documents,
        ).loss

    def _has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return bool(self.process_group.broadcast_object(manager.list_checkpoints(self.run_dir)))

    def _load_latest(self) -> tuple[Path, dict[str, Any]]:
        """Restore the newest intact checkpoint; return its path and metadata."""
        if self.process_group.rank:
            return self.run_dir, self.restore(self.run_dir)  # rank 0 alone knows the path
        return manager.load_latest(self.run_dir, self.restore, self.echo)

    def _prune_checkpoints(self, keep: int) -> None:
        if self.process_group.rank == 0:
            manager.prune_checkpoints(self.run_dir, keep)

    def _resume(self) -> None:
        """Continue from the newest checkpoint; print which one, and what has changed since."""
        is_first = self.process_group.rank == 0
        if not self._has_checkpoint():
            # the other processes may be on machines that do not have the folder
            if is_first and not (self.run_dir / "config.toml").exists():
                raise InputError(f"{self.run_dir} holds no checkpoint to resume from")
            if self.config.finetune.initialize_from:
                raise InputError(
                    f"{self.run_dir} lost its checkpoints, and with them its initial weights: "
                    "start it again"
                )
            self._find_newer_best()
            self.echo(f"resume  {self.run_dir} ended before its first checkpoint: from the start")
            return
        path, info = self._load_latest()
        saved, now = info.get("environment", {}), self._environment()
        self.echo(f"resume  {path}, step {self.progress.step:,}")
        if not self._is_of_this_text(info):
            train, val = info["split"]
            self.echo(
                f"text    {self.corpus.train.n_tokens - train:,} training tokens and "
                f"{self.corpus.val.n_tokens - val:,} validation tokens were added to {train:,} and "
                f"{val:,}; epoch {self.progress.earlier_epochs + 1:.6g} begins, of the longer text"
            )
        before = TrainConfig.from_dict(info["train"]).length
        if before != self.config.length:
            self.echo(
                f"length  {before.describe()} before, now {self.config.length.describe()}: the "
                f"learning rate goes on at {self.lr_share():.0%} of its peak, as in a run of that "
                f"length ({self.config.optimizer.schedule})"
            )
        changes = [f"{k} {saved[k]}, now {now[k]}" for k in saved if saved[k] != now.get(k)]
        if changes:
            self.echo(
                f"note    trained with {', '.join(changes)}: the resumed run is close to an "
                "uninterrupted one, not equal bit for bit"
            )

    def _environment(self) -> dict[str, Any]:
        """Facts that the exact numbers of a run depend on, besides its settings and its data."""
        is_distributed = dist.is_available() and dist.is_initialized()
        return {
            "threads": torch.get_num_threads(),
            "processes": dist.get_world_size() if is_distributed else 1,
            "processor": torch.backends.cpu.get_cpu_capability(),
            "newton_schulz": str(self.optimizer.newton_schulz_dtype).removeprefix("torch."),
            **{name: metadata.version(name) for name in ("torch", "numba", "numpy")},
        }


def check_same_text(
    saved: dict[str, Any],
    now: dict[str, Any],
    config: TrainConfig,
    path: Path,
    earlier: Sequence[dict[str, Any]] = (),
) -> None:
    """Check that a run continues with the texts that it began with.

    Args:
        saved: the metadata of a checkpoint.
        now: what identifies the texts now; see ``Corpus.identity``.
        config: the settings, which name the texts.
        path: the checkpoint or the run, for the error message.
        earlier: what identifies the texts to which this one was added.

    Raises:
        InputError: a text is another one, or the checkpoint is of a version that knew texts by
            their names.
    """
    if "fingerprint" in saved and "split" not in saved:
        raise InputError(
            f"{path} was saved by mmrec 0.2 or earlier, which knew texts by their names, so it is "
            "not known whether this is the same text: begin a new run with --initialize-from"
        )
    continued = next((t for t in earlier if t["fingerprint"] == saved.get("fingerprint")), {})
    for key, value in (now | continued).items():
        if saved.get(key, value) != value:
            if key == "teachers_fingerprint":
                raise InputError(
                    f"the teachers {config.distillation.teachers} have changed since {path} was "
                    "saved; a run continues with the same teachers only"
                )
            is_replay = key == "replay_fingerprint"
            text = config.finetune.replay_data if is_replay else config.data.source
            what = key if key in ("mixture", "split", "tokenizer") else "text"
            raise InputError(
                f"the {what} of {text} is another one, or changed since {path} was saved; a run "
                "continues with the same text only, under any name; a new run takes up its model "
                "with --initialize-from"
            )


def _count_steps(count: int) -> str:
    return f"{count:,} step{'s' * (count != 1)}"


def _all_finite(x: Tensor) -> bool:
    """Whether all elements are finite, without a copy: NaN and infinity are extremes."""
    return x.numel() == 0 or all(bool(torch.isfinite(y)) for y in torch.aminmax(x))
