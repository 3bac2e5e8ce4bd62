"""The state of a run: all that a checkpoint holds, what a step does to it, how it is kept and got
back bit for bit."""

import contextlib
import dataclasses
import math
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_ as clip

from mmrec import lora
from mmrec.checkpoint import checkpoint
from mmrec.config import (
    DEFAULT_EPOCHS,
    DEFAULT_TOKENS,
    LEAST_STEPS,
    ModelConfig,
    TrainConfig,
    from_dict,
)
from mmrec.data.corpus import Corpus
from mmrec.data.dataloader import Batches, Mixed, Mixture, deal, spread_pieces
from mmrec.data.prepare import open_corpus
from mmrec.errors import InputError, TrainingDivergedError, WeightsDivergedError
from mmrec.evaluation.evaluate import LANES, Evaluation
from mmrec.finetune.start import freeze, rates_by_layer, take_over
from mmrec.model import Model
from mmrec.model import State as Memories
from mmrec.optimizer import Muon
from mmrec.runtime import malloc as heap
from mmrec.runtime.atomic import keep_trying
from mmrec.runtime.distributed import ALONE, World
from mmrec.runtime.hardware import probe_bfloat16
from mmrec.runtime.interrupts import Stop
from mmrec.training.lr_schedule import lr_factor
from mmrec.training.replicas import gradients, join, lanes_for, split
from mmrec.training.run_dir import Progress


def conditions() -> dict[str, Any]:
    """What the bits of a run depend on besides its settings and data."""
    versions = {name: metadata.version(name) for name in ("torch", "numba", "numpy")}
    capability = torch.backends.cpu.get_cpu_capability()
    together = dist.is_available() and dist.is_initialized()
    processes = dist.get_world_size() if together else 1
    return {
        "threads": torch.get_num_threads(),
        "processes": processes,
        "processor": capability,
        **versions,
    }


def _finite(x: Tensor) -> bool:
    """Whether all is: without a copy, as what is not is the least or the largest."""
    return x.numel() == 0 or all(bool(torch.isfinite(y)) for y in torch.aminmax(x))


class State:
    """Model, data, optimizer, random numbers and position of one run."""

    def __init__(
        self,
        folder: Path,
        corpus: Corpus,
        model_config: ModelConfig,
        config: TrainConfig,
        preset: str,
        world: World = ALONE,
    ) -> None:
        """Raises InputError if the settings do not fit the corpus, the model or the world."""
        self.folder, self.corpus, self.config, self.preset = folder, corpus, config, preset
        self.world = world
        if config.batch % world.size:
            raise InputError(
                f"batch must be a multiple of the {world.size} processes that share "
                f"its rows; got {config.batch}"
            )
        if config.grow_from and world.sharded:
            raise InputError(
                "--grow-from begins with --parallel ddp or in one process; then go on "
                "with --resume --parallel fsdp"
            )
        # before the seed counts: a resume does not probe
        wants = config.precision == "bfloat16" or (config.precision == "auto" and probe_bfloat16())
        torch.manual_seed(config.seed)
        self.model = Model(
            dataclasses.replace(model_config, vocab_size=corpus.tokenizer.vocab_size), world.shard
        )
        world.shard_root(self.model)
        self.set_precision("bfloat16" if wants else "float32")
        self.model.recompute = config.recompute
        if config.recompute:
            heap.leave_no_holes()
        if config.lora:
            if world.size > 1:
                raise InputError(f"lora learns in a single process; there are {world.size}")
            lora.attach(self.model, config.lora, config.lora_alpha)
        freeze(self.model, config.freeze)
        self.batches: Batches | Mixture | Mixed = deal(
            corpus.train.tokens,
            corpus.parts,
            config.batch,
            config.seq_len,
            config.seed,
            carry=config.state == "carry",
        )
        self.fingerprints = {"fingerprint": corpus.info["fingerprint"]}
        """Of all text that is learnt from; a run goes on with the same only."""
        if config.replay:
            replayed = open_corpus(config.replay_data, corpus.tokenizer)
            self.fingerprints["replay_fingerprint"] = replayed.info["fingerprint"]
            old = Batches(replayed.train.tokens, config.batch, config.seq_len, config.seed)
            self.batches = Mixed(self.batches, old, config.replay)
        self.carried: Memories | None = None
        """What this process's rows of a batch go on from, if they do."""
        self.carried_before: Memories | None = None
        if corpus.val.n_tokens <= config.seq_len:
            raise InputError(
                f"the validation split must hold one window of {config.seq_len + 1} tokens; it has "
                f"{corpus.val.n_tokens}: use more text or a smaller seq_len"
            )
        self.lanes = lanes_for(self.model, config.batch // world.size, world)
        groups = self.model.parameter_groups(config.weight_decay, config.table_decay)
        if config.layer_decay < 1:
            groups = rates_by_layer(self.model, groups, config.layer_decay)
        self.optimizer = Muon(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            muon_lr=config.muon_lr,
            lanes=self.lanes,
            world=world,
        )
        for group in self.optimizer.param_groups:
            group["peak"] *= group.get("rate", 1.0)
        table = [len(corpus.tokenizer.token_bytes(i)) for i in range(corpus.tokenizer.vocab_size)]
        self.subset = spread_pieces(corpus.val.tokens, config.eval_tokens, LANES)
        self.subset_bytes = max(1, sum(table[t] for t in self.subset.tolist()))
        self.progress = Progress()
        self.val: Evaluation | None = None
        self.ahead: tuple[float, int] | None = None
        """Loss and step of a best model that lies ahead (see find_ahead)."""
        self.rng = torch.get_rng_state()
        """The random state before the newest step."""
        self.stop = Stop(world.most if world.size > 1 else None)

    def start_from(self, source: checkpoint.Loaded, how: str = "preserve") -> None:
        """Take over the weights of a checkpoint, grown to this model's shape, and its moments.

        ``how`` is as in ``Growth``. Raises InputError if the shape cannot be grown to.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.progress.aged = take_over(self.model, self.optimizer, source, how)
        if self.config.lora:  # what is learnt has no past
            self.optimizer.state.clear()
            self.progress.aged = 0

    def set_precision(self, precision: str) -> None:
        """Settle what ``auto`` is, so that no later probe settles it otherwise."""
        self.config = dataclasses.replace(self.config, precision=precision)
        self.model.set_precision(precision)

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
        steps = DEFAULT_TOKENS // (c.batch * c.seq_len * c.accumulate)
        passes = DEFAULT_EPOCHS * self.steps_per_epoch
        return c.steps or max(LEAST_STEPS, min(steps, passes))

    def fraction(self, ahead: float = 0.0) -> float:
        """How far the run is, 0 to 1, or will be ``ahead`` steps from now."""
        p = self.progress
        if self.config.minutes is not None:
            return min(1.0, p.seconds * (1 + ahead / max(1, p.step)) / (60 * self.config.minutes))
        return min(1.0, (p.step + ahead) / (self.total_steps or 1))

    def gradients(self, step: int) -> float:
        """Accumulate the gradients of a step's data; return its mean loss. Both of all processes,
        each of which takes an equal share of the rows."""
        total, world = 0.0, self.world
        n = self.config.accumulate * world.size
        eot = self.corpus.tokenizer.eot if self.resets else None
        for micro in range(step * self.config.accumulate, (step + 1) * self.config.accumulate):
            x, y = (b.tensor_split(world.size)[world.rank] for b in self.batches.get(micro))
            if self.config.state != "carry" or self.batches.begins(micro):
                self.carried = None
            loss, self.carried = gradients(
                self.model, self.lanes, x, y, 1 / n, state=self.carried, eot=eot, world=world
            )
            total += loss / n
        return world.add_up(total, [p.grad for p in self.model.parameters() if p.grad is not None])

    @property
    def resets(self) -> bool:
        """Whether every document starts without a memory of those before it."""
        return self.config.state != "window"

    def warm_up(self) -> tuple[float, float]:
        """Compile the kernels and time a step without taking one: (seconds of both)."""
        state, carried, times = torch.get_rng_state(), self.carried, []
        try:
            for _ in range(4):
                begin = time.perf_counter()
                self.gradients(0)
                self.model.zero_grad(set_to_none=True)
                times.append(time.perf_counter() - begin)
                self.stop.check()
        finally:
            torch.set_rng_state(state)
            self.carried = carried
        return times[0], sorted(times[1:])[1] * 1.2  # the optimizer takes about a sixth of a step

    def take_step(self) -> tuple[float, float, float]:
        """One optimizer step; returns loss, gradient norm and learning rate."""
        c, p = self.config, self.progress
        factor = lr_factor(self.fraction(0.5), c.warmup, c.schedule, c.min_lr) * p.rate
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        self.rng, self.carried_before = torch.get_rng_state(), self.carried
        loss = self.gradients(p.step + p.moved)
        weights = list(self.model.parameters())
        [norm] = map(float, self.lanes.run([lambda: self.world.whole(clip(weights, c.clip))]))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
            raise TrainingDivergedError(f"{what} at step {p.step + 1}")
        self.optimizer.step()
        return loss, norm, c.lr * factor

    def save(self, name: str, *, whole: bool) -> None:
        """Write a checkpoint; ``whole`` ones can be resumed from.

        Raises:
            WeightsDivergedError: a weight is not finite; nothing was written.
        """
        world, weights = self.world, list(self.model.named_parameters())
        bad = (i for i, (_, p) in enumerate(weights) if not _finite(world.local(p.detach())))
        first = -world.most(-next(bad, math.inf))
        if first < math.inf:
            name = weights[int(first)][0]
            raise WeightsDivergedError(f"weight {name} not finite at step {self.progress.step}")
        val = dataclasses.asdict(self.val) if self.val else None
        info = {
            "preset": self.preset,
            "train": dataclasses.asdict(self.config),
            "val": val,
            "source": self.corpus.info["source"],
            "precision": self.config.precision,
            **self.fingerprints,
            "conditions": conditions(),
        }
        kept: dict[str, Any] = {}
        if whole:
            rows = self.carried if self.config.state == "carry" else None
            kept = {
                "optimizer": self.optimizer,
                "progress": dataclasses.asdict(self.progress),
                "carried": join(world.all(rows)) if rows else None,
            }
        path, tokenizer = self.folder / name, self.corpus.tokenizer
        step = self.progress.step

        def write() -> None:
            checkpoint.save(path, self.model, tokenizer, step, info, **kept, world=world)

        def again() -> None:
            world.told(True)
            write()

        if world.rank == 0:
            keep_trying(again)
            world.told(False)
        else:  # as often as rank 0 tries
            while world.told(False):
                write()
        if whole:
            heap.give_back()

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a checkpoint as if nothing had come after it; return its info. Of several
        processes, rank 0 reads it."""
        world, c = self.world, self.config
        first = world.rank == 0
        info = checkpoint.read_info(path)[1] if first else {}
        for key, now in self.fingerprints.items() if first else ():
            if info.get(key, now) != now:  # an older file does not know of every text
                text = c.data if key == "fingerprint" else c.replay_data
                raise InputError(f"the text of {text} changed since {path} was saved")
        rows = None
        try:
            values = checkpoint.restore(path, self.model, self.optimizer, world)
            if c.state == "carry" and first:
                rows = checkpoint.carried(path, self.model.start(c.batch))
        except InputError as error:
            if world.size > 1:  # the others have begun with this one: none before it is tried
                raise InputError(str(error)) from None
            raise
        self.progress = from_dict(Progress, values)
        rows = world.told(rows)
        self.carried = None if rows is None else split(rows, world.size)[world.rank]
        self.carried_before = None
        info = world.told(info)
        self.set_precision(info["precision"])
        self.val = from_dict(Evaluation, info["val"]) if info["val"] else None
        self.find_ahead()
        return info

    def find_ahead(self) -> None:
        """Note a best model of a step still to come, which a kill or a rollback leaves behind: no
        worse one may take its place."""
        ahead = None
        with contextlib.suppress(InputError):  # none there, or none that can be read
            step, info, _ = checkpoint.read_info(self.folder / "best.h5")
            if step > self.progress.step:
                ahead = info["val"]["loss"], step
        self.ahead = self.world.told(ahead)
