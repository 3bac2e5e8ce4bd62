"""The models of the race: mmrec and its baselines, each trained for a number of seconds.

    python benchmarks/baselines.py gru input.txt --seconds 108 --set lr=4e-3

trains one model in this process and prints one JSON line. Every model trains on the same tokens and
is scored on every token of the validation split. A recurrent model carries its state through the
whole split; a model with a window sees each token after at least half a window. The settings of the
baselines were found by `search.py`, except those of nanoGPT's published recipe ("nanogpt").

What mmrec's training has, a baseline can have as well: Muon for its matrices (``optimizer=muon``),
weight decay, dropout of embeddings, layers and logits, windows whose state is carried on
(``carry``, LSTM and GRU), bfloat16 and compiling; an average of the weights (``ema``); and the
n-gram embedding with its optimizer (``ngram_buckets``; transformer, LSTM, GRU and xLSTM).

Axes: B sequences, T tokens per sequence, D width, V vocabulary size.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrec.config import MODEL_SETTINGS, TRAIN_SETTINGS
from mmrec.data.corpus import Corpus
from mmrec.data.dataloader import WindowLoader
from mmrec.data.prepare import prepare
from mmrec.kernels.rowwise_rmsprop.op import rowwise_rmsprop_
from mmrec.model import ngram_rows, previous_tokens
from mmrec.optimizer import MEAN_SQUARE_DECAY, MuonAdamW
from mmrec.runtime.numeric import cdiv
from mmrec.training.lr_schedule import lr_factor

VALIDATIONS = 8  # during training; their time does not count

# Settings of each model; those of mmrec are its defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "mmrec": {},
    "transformer": {
        "lr": 3e-3,
        "batch": 16,
        "seq_len": 128,
        "width": 128,
        "depth": 4,
        "heads": 4,
        "bf16": True,
    },
    "nanogpt": {
        "lr": 1e-3,
        "batch": 12,
        "seq_len": 64,
        "width": 128,
        "depth": 4,
        "heads": 4,
        "warmup": 0.05,
        "schedule": "cosine",
        "floor": 0.1,
        "beta2": 0.99,
    },
    "nanogpt-tuned": {
        "lr": 3e-3,
        "batch": 4,
        "seq_len": 128,
        "width": 128,
        "depth": 4,
        "heads": 4,
        "beta2": 0.99,
    },
    "lstm": {"lr": 4e-3, "batch": 4, "seq_len": 128, "width": 256, "depth": 2},
    "gru": {"lr": 4e-3, "batch": 8, "seq_len": 128, "width": 256, "depth": 2},
    "mingru": {"lr": 3e-3, "batch": 16, "seq_len": 128, "width": 128, "depth": 4},
    "mamba": {"lr": 3e-3, "batch": 16, "seq_len": 128, "width": 128, "depth": 4},
    "xlstm": {
        "lr": 3e-3,
        "batch": 8,
        "seq_len": 128,
        "width": 128,
        "depth": 4,
        "heads": 4,
        "slstm": False,
    },
}
# What differs by character: the best of 24 trials for the LSTM and of 20 for the transformer, on
# 1.2 MB of the King James Bible, 108 s on one core (results/search).
CHAR_SETTINGS: dict[str, dict[str, Any]] = {
    "lstm": {"lr": 6.2e-3, "decay": 0.039, "warmup": 0.1, "width": 192, "depth": 1},
    "transformer": {"lr": 1.6e-3, "decay": 0.032, "seq_len": 64, "depth": 3, "bf16": False},
}
# What differs with a bpe vocabulary of 5,000. LSTM and transformer have the best of 14 and 12
# trials, and of three by hand each, on 2 MB of the King James Bible, 108 s on one core
# (results/search). The others were searched on TinyStories.
BPE_SETTINGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "lr": 4.8e-3,
        "decay": 0.35,
        "batch": 32,
        "seq_len": 32,
        "depth": 3,
        "warmup": 0.1,
        "beta2": 0.99,
        "dropout": 0.2,
        "embedding_dropout": 0.1,
        "compile": True,
    },
    "lstm": {
        "lr": 8.7e-3,
        "decay": 0.65,
        "seq_len": 256,
        "depth": 1,
        "dropout": 0.05,
        "bf16": True,
    },
    "gru": {"lr": 8e-3, "seq_len": 64, "width": 192, "depth": 1, "bf16": True},
    "mingru": {"lr": 4e-3, "batch": 4, "seq_len": 64, "width": 96, "depth": 1},
    "mamba": {"lr": 8e-3, "batch": 4, "depth": 1},
    "nanogpt-tuned": {"lr": 4e-3, "seq_len": 64, "width": 96, "depth": 2},
}
# On a text below SMALL_TEXT bytes, from 100 s on: the best of four dropouts on the same text.
BPE_DROPOUT = 0.2
# Long runs repeat a text below SMALL_TEXT bytes. From these seconds on, every model that can have
# dropout gets it, and in the longest runs mmrec gets a strong weight decay.
SMALL_TEXT, DROPOUT_BY_SECONDS = 4_000_000, {200: 0.1, 600: 0.2}
# Settings of the training loop below, which trains all models but mmrec.
LOOP_SETTINGS: dict[str, Any] = {
    "optimizer": "adamw",  # or muon: Muon for the matrices of the layers, AdamW for the rest
    "matrix_lr": 0.02,  # Muon's
    "warmup": 0.03,
    "schedule": "linear",
    "floor": 0.0,
    "beta2": 0.95,
    "decay": 0.1,
    "dropout": 0.0,
    "embedding_dropout": 0.0,
    "ngram_buckets": 0,  # rows of an n-gram embedding as mmrec's
    "ngram_lr": 0.01,  # its rate, mmrec's
    "ngram_decay": 1.0,  # its weight decay, mmrec's
    "carry": False,  # windows continue the state of those before
    "ema": 0.0,  # horizon of the average of the weights that is scored, as a share of the run
    "bf16": False,
    "compile": False,
}


def settings(name: str, seconds: float, tokenizer: str, size: int = 0) -> dict[str, Any]:
    """Return the settings of a model for a training time and a training text of ``size`` bytes."""
    chosen = {} if name == "mmrec" else dict(LOOP_SETTINGS)
    chosen |= SETTINGS[name]
    by_tokenizer = {"bpe": BPE_SETTINGS, "char": CHAR_SETTINGS}.get(tokenizer, {})
    chosen |= by_tokenizer.get(name, {})
    for least, dropout in DROPOUT_BY_SECONDS.items():
        if seconds >= least and size <= SMALL_TEXT and name not in ("nanogpt", "mamba"):
            chosen["dropout"] = dropout
            if name == "mmrec" and dropout == max(DROPOUT_BY_SECONDS.values()):
                chosen["weight_decay"] = 1.0
    if name == "mmrec" and tokenizer == "bpe" and seconds >= 100 and size <= SMALL_TEXT:
        chosen["dropout"] = BPE_DROPOUT
    return chosen


STATEFUL = ("lstm", "gru")
"""Baselines whose state can be carried from window to window."""


class NgramEmbedding(nn.Module):
    """The n-gram embedding of mmrec, in front of another model: pairs and triples of tokens."""

    def __init__(self, buckets: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(buckets, width))
        self.mean_square = torch.zeros(buckets)

    @torch.compiler.disable  # compiled functions have no sparse gradients
    def forward(self, tokens: Tensor) -> Tensor:
        """The sum of two rows for each token (B, T); 0 stands before the window."""
        previous = previous_tokens(tokens, tokens.new_zeros(len(tokens), 2), None)
        rows = ngram_rows(tokens, previous, len(self.weight))
        return F.embedding(rows, self.weight, sparse=True).sum(0)

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float) -> None:
        """Update the rows that have a gradient, as mmrec does."""
        gradient, self.weight.grad = self.weight.grad, None
        assert gradient is not None
        indices, values = gradient._indices()[0], gradient._values()
        rowwise_rmsprop_(
            self.weight, self.mean_square, indices, values, lr, MEAN_SQUARE_DECAY, weight_decay
        )


class InputEmbedding(nn.Module):
    """The embedding of the tokens of a model, and of n-grams if its options ask for them."""

    def __init__(self, vocab: int, std: float, options: dict[str, Any]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, options["width"])
        nn.init.normal_(self.tokens.weight, std=std)
        buckets = options["ngram_buckets"]
        self.ngrams = NgramEmbedding(buckets, options["width"]) if buckets else None
        self.dropout = nn.Dropout(options["embedding_dropout"])

    @property
    def weight(self) -> Tensor:
        """The embedding of the tokens, (V, D)."""
        return self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        return self.dropout(x if self.ngrams is None else x + self.ngrams(tokens))


class Attention(nn.Module):
    """Causal attention with rotary positions and normalised queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.in_proj(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        half = q.shape[-1] // 2
        angle = torch.arange(time)[:, None] * 10000 ** -(torch.arange(half) / half)
        cos, sin = angle.cos(), angle.sin()

        def normalise_and_rotate(u: Tensor) -> Tensor:
            u = F.rms_norm(u.float(), u.shape[-1:])
            a, b = u.split(half, -1)
            return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(v.dtype)

        q, k = normalise_and_rotate(q), normalise_and_rotate(k)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).reshape(batch, time, width))


class Transformer(nn.Module):
    """A small modern transformer: RoPE, QK-norm, relu², outputs initialised to zero."""

    def __init__(self, vocab: int, options: dict[str, Any]) -> None:
        super().__init__()
        width, depth, heads = options["width"], options["depth"], options["heads"]
        self.embedding = InputEmbedding(vocab, 0.02, options)
        self.attention = nn.ModuleList(Attention(width, heads) for _ in range(depth))
        self.up_proj = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(depth))
        self.down_proj = nn.ModuleList(
            nn.Linear(4 * width, width, bias=False) for _ in range(depth)
        )
        self.dropout = nn.Dropout(options["dropout"])
        for attention, down in zip(self.attention, self.down_proj, strict=True):
            nn.init.zeros_(attention.out_proj.weight)  # type: ignore[union-attr, arg-type]
            nn.init.zeros_(down.weight)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        norm = x.shape[-1:]
        for attention, up, down in zip(self.attention, self.up_proj, self.down_proj, strict=True):
            x = x + self.dropout(attention(F.rms_norm(x, norm)))
            x = x + self.dropout(down(F.relu(up(F.rms_norm(x, norm))).square()))
        return F.linear(F.rms_norm(x, norm), self.embedding.weight)


class Recurrent(nn.Module):
    """torch.nn.LSTM or GRU with logits tied to the embedding; evaluation carries its state."""

    def __init__(self, kind: str, vocab: int, options: dict[str, Any]) -> None:
        super().__init__()
        width, depth, dropout = options["width"], options["depth"], options["dropout"]
        self.embedding = InputEmbedding(vocab, width**-0.5, options)
        between = dropout if depth > 1 else 0.0
        cls = nn.LSTM if kind == "lstm" else nn.GRU
        self.rnn = cls(width, width, depth, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        x, state = self.rnn(self.embedding(tokens), state)
        return F.linear(self.dropout(x), self.embedding.weight), state


class XLSTM(nn.Module):
    """The xLSTM of the package of its authors: mLSTM blocks, and one sLSTM block in the middle."""

    def __init__(self, vocab: int, options: dict[str, Any]) -> None:
        super().__init__()
        from xlstm import (
            FeedForwardConfig,
            mLSTMBlockConfig,
            mLSTMLayerConfig,
            sLSTMBlockConfig,
            sLSTMLayerConfig,
            xLSTMBlockStack,
            xLSTMBlockStackConfig,
        )

        width, depth, heads = options["width"], options["depth"], options["heads"]
        self.embedding = InputEmbedding(vocab, width**-0.5, options)
        self.blocks = xLSTMBlockStack(
            xLSTMBlockStackConfig(
                mlstm_block=mLSTMBlockConfig(mLSTMLayerConfig(num_heads=heads)),
                slstm_block=sLSTMBlockConfig(
                    sLSTMLayerConfig(backend="vanilla", num_heads=heads),
                    FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
                ),
                context_length=options["seq_len"],
                num_blocks=depth,
                embedding_dim=width,
                dropout=options["dropout"],
                slstm_at=[depth // 2] if options["slstm"] else [],
            )
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks(self.embedding(tokens))
        return F.linear(x, self.embedding.weight)


def build(name: str, vocab: int, options: dict[str, Any], nanogpt: Path | None) -> nn.Module:
    """Build the model of a baseline; ``nanogpt`` is the folder of a nanoGPT checkout."""
    width, depth, dropout = options["width"], options["depth"], options["dropout"]
    if name in STATEFUL:
        return Recurrent(name, vocab, options)
    if name == "transformer":
        return Transformer(vocab, options)
    if name == "xlstm":
        return XLSTM(vocab, options)
    if name == "mingru":
        from minGRU_pytorch.minLM import minLM

        return minLM(num_tokens=vocab, dim=width, depth=depth, enable_conv=True, dropout=dropout)
    if name == "mamba":
        from mambapy.mamba import Mamba, MambaConfig

        core = Mamba(MambaConfig(d_model=width, n_layers=depth))
        return nn.Sequential(
            nn.Embedding(vocab, width), core, nn.RMSNorm(width), nn.Linear(width, vocab, bias=False)
        )
    if nanogpt is None:
        raise SystemExit(f"{name} needs --nanogpt, the folder of a nanoGPT checkout")
    sys.path.insert(0, str(nanogpt))
    from model import GPT, GPTConfig

    return GPT(
        GPTConfig(
            block_size=options["seq_len"],
            vocab_size=vocab,
            n_layer=depth,
            bias=False,
            n_head=options["heads"],
            n_embd=width,
            dropout=dropout,
        )
    )


def logits_of(name: str, model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits (B, T, V) of tokens (B, T) int64."""
    if name.startswith("nanogpt"):
        x = x.contiguous()
        return model(x, x)[0]  # without targets nanoGPT returns the last position only
    output = model(x)
    return output[0] if isinstance(output, tuple) else output


@torch.inference_mode()
def score(name: str, model: nn.Module, tokens: np.ndarray, seq_len: int, bf16: bool) -> float:
    """Return the mean loss in nats per token over tokens (n,); the first one follows token 0."""
    model.eval()
    stream = torch.from_numpy(np.concatenate(([0], tokens)).astype(np.int64))
    total = 0.0
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if name in STATEFUL:
            state = None
            for lo in range(0, len(tokens), 1024):
                x, y = stream[lo : lo + 1024], stream[lo + 1 : lo + 1025]
                logits, state = model(x[None, : len(y)], state)
                total += float(F.cross_entropy(logits[0].float(), y, reduction="sum"))
        else:
            half = seq_len // 2
            before = stream.new_zeros(half)
            length = cdiv(len(tokens), half) * half
            x = torch.cat((before, stream[:-1], stream.new_zeros(length - len(tokens))))
            y = torch.cat((stream[1:], stream.new_full((length - len(tokens),), -100)))
            windows = x.unfold(0, seq_len, half)[: length // half]
            targets = y.view(-1, half)
            # the first window begins with padding, so its targets are scored without it
            first = logits_of(name, model, windows[:1, half:])
            total += float(F.cross_entropy(first[0].float(), targets[0], reduction="sum"))
            for lo in range(1, len(windows), 32):
                logits = logits_of(name, model, windows[lo : lo + 32])[:, half:]
                flat = logits.reshape(-1, logits.shape[-1]).float()
                flat_targets = targets[lo : lo + 32].reshape(-1)
                total += float(F.cross_entropy(flat, flat_targets, reduction="sum"))
    model.train()
    return total / len(tokens)


def make_optimizer(model: nn.Module, options: dict[str, Any]) -> torch.optim.Optimizer:
    """Return the optimizer of a baseline. Embeddings, norms and biases have no weight decay."""
    betas = (0.9, options["beta2"])
    if hasattr(model, "configure_optimizers"):  # nanoGPT makes its own optimizer
        optimizer: torch.optim.Optimizer = model.configure_optimizers(
            options["decay"], options["lr"], betas, "cpu"
        )
        return optimizer
    named = [(n, p) for n, p in model.named_parameters() if not n.endswith("ngrams.weight")]
    matrices = [p for n, p in named if p.ndim >= 2 and "emb" not in n]
    others = [p for n, p in named if p.ndim < 2 or "emb" in n]
    if options["optimizer"] == "muon":
        flat = [p for p in matrices if p.ndim == 2]  # not the kernels of convolutions
        others += [p for p in matrices if p.ndim > 2]
        return MuonAdamW(
            [
                {"params": flat, "weight_decay": options["decay"], "use_muon": True},
                {"params": others, "weight_decay": 0.0, "use_muon": False},
            ],
            lr=options["lr"],
            matrix_lr=options["matrix_lr"],
            betas=betas,
        )
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=options["lr"], betas=betas, weight_decay=options["decay"], fused=True
    )


class AverageOfWeights:
    """An exponential average of a model's weights, which is scored in their place."""

    def __init__(self, model: nn.Module, horizon: float) -> None:
        """Begin with the weights as they are.

        Args:
            model: the model.
            horizon: how far back the average reaches, as a share of the run.
        """
        self._parameters, self._horizon = list(model.parameters()), horizon
        self._average = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self, step_share: float, done: float) -> None:
        """Take in the weights after a step.

        Args:
            step_share: how much of the run the step was.
            done: how much of the run is done; the average never reaches back to its beginning.
        """
        weight = min(1.0, step_share / max(min(self._horizon, done / 4), 1e-9))
        torch._foreach_lerp_(self._average, self._parameters, weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights of the model and their average."""
        for p, average in zip(self._parameters, self._average, strict=True):
            kept = p.clone()
            p.copy_(average)
            average.copy_(kept)


def train_baseline(name: str, corpus: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """Train a baseline for its seconds; compilation and the first steps do not count."""
    options = args.set
    torch.manual_seed(args.seed)
    vocab = corpus.tokenizer.vocab_size
    model = build(name, vocab, options, args.nanogpt)
    optimizer = make_optimizer(model, options)
    average = AverageOfWeights(model, options["ema"]) if options["ema"] else None
    peaks = [group["lr"] for group in optimizer.param_groups]
    ngrams = next((m for m in model.modules() if isinstance(m, NgramEmbedding)), None)
    clipped = [p for n, p in model.named_parameters() if not n.endswith("ngrams.weight")]
    carry = options["carry"] and name in STATEFUL
    loader = WindowLoader(
        corpus.train.tokens, options["batch"], options["seq_len"], args.seed, carry=carry
    )
    training_model: Any = torch.compile(model) if options["compile"] else model
    state: Any = None

    def backward(step: int) -> None:
        nonlocal state
        x, y = loader.batch_at(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=options["bf16"]):
            if name.startswith("nanogpt"):
                loss = training_model(x, y)[1]
            else:
                if carry:
                    if loader.starts_epoch(step):
                        state = None
                    logits, state = training_model(x, state)
                    state = _detached(state)
                else:
                    logits = logits_of(name, training_model, x)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
        loss.backward()

    begin = time.perf_counter()
    for _ in range(3):
        backward(0)
    seconds_until_ready = time.perf_counter() - begin
    model.zero_grad(set_to_none=True)

    def validate() -> float:
        if average:
            average.swap()
        loss = score(name, model, corpus.val.tokens, options["seq_len"], options["bf16"])
        if average:
            average.swap()
        return loss

    spent, step, curve, next_validation = 0.0, 0, [], args.seconds / VALIDATIONS
    while spent < args.seconds:
        begin = time.perf_counter()
        before = spent
        factor = lr_factor(
            spent / args.seconds, options["warmup"], options["schedule"], options["floor"]
        )
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        backward(step)
        torch.nn.utils.clip_grad_norm_(clipped, 1.0)
        optimizer.step()
        if ngrams is not None:
            ngrams.step(options["ngram_lr"] * factor, options["ngram_decay"])
        model.zero_grad(set_to_none=True)
        step += 1
        spent += time.perf_counter() - begin
        if average:
            average.update((spent - before) / args.seconds, spent / args.seconds)
            spent = before + time.perf_counter() - begin
        if next_validation <= spent < args.seconds and args.curve:
            curve.append((spent, validate()))
            next_validation += args.seconds / VALIDATIONS
    loss = validate()
    curve.append((spent, loss))
    tokens = step * options["batch"] * options["seq_len"]
    return {
        "loss": loss,
        "curve": curve,
        "steps": step,
        "tokens": tokens,
        "seconds": spent,
        "ready": seconds_until_ready,
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": options,
    }


def _detached(state: Any) -> Any:
    """The state of a recurrent model, cut off from the graph of the window that it ends."""
    return tuple(map(_detached, state)) if isinstance(state, tuple) else state.detach()


def to_toml(options: dict[str, Any]) -> str:
    """Write settings of mmrec, given by flat name, as its configuration file."""
    declared = MODEL_SETTINGS | TRAIN_SETTINGS
    tables: dict[str, list[str]] = {}
    for flat_name, value in options.items():
        setting = declared[flat_name]
        lines = tables.setdefault(setting.section, [f"[{setting.section}]"])
        lines.append(f"{setting.name} = {json.dumps(value)}")
    return "\n".join(line for lines in tables.values() for line in lines) + "\n"


def train_mmrec(corpus: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """Train mmrec with its command, as a user does."""
    with tempfile.TemporaryDirectory() as folder:
        out, config = Path(folder, "run"), Path(folder, "run.toml")
        options = {"eval_tokens": corpus.val.n_tokens, "save_every": 10**9, **args.set}
        if not args.curve:
            options["eval_every"] = 10**9
        config.write_text(to_toml(options))
        command = [
            sys.executable,
            "-m",
            "mmrec",
            "train",
            args.preset,
            "--config",
            str(config),
            "--data",
            str(corpus.path),
            "--minutes",
            str(args.seconds / 60),
            "--seed",
            str(args.seed),
            "--out",
            str(out),
        ]
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        wall = time.perf_counter() - begin
        summary = json.loads((out / "summary.json").read_text())
        lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
        from mmrec.checkpoint.checkpoint import load_model

        count = sum(p.numel() for p in load_model(out / "best.h5").model.parameters())
    rate = summary["seconds"] / summary["steps"]
    curve = [(x["step"] * rate, x["loss"]) for x in lines if x["kind"] == "val"]
    loss = summary["epochs"][-1]["val_loss"]
    return {
        "loss": loss,
        "curve": curve,
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "seconds": summary["seconds"],
        "ready": wall - summary["seconds"],
        "parameters": count,
        "settings": args.set | {"preset": args.preset},
    }


def pair(text: str) -> tuple[str, Any]:
    """Parse ``lr=4e-3`` as ("lr", 0.004)."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=list(SETTINGS))
    parser.add_argument("data")
    parser.add_argument("--tokenizer", default="char")
    parser.add_argument("--seconds", type=float, default=108)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", type=pair, nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-curve", dest="curve", action="store_false")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    corpus = Corpus.open(prepare(args.data, args.tokenizer, 5000))
    defaults = settings(args.name, args.seconds, args.tokenizer, corpus.train.n_bytes)
    args.set = defaults | dict(args.set)
    if args.name == "mmrec":
        result = train_mmrec(corpus, args)
    else:
        result = train_baseline(args.name, corpus, args)
    bits_per_token = result["loss"] / math.log(2)
    result["bits_per_byte"] = bits_per_token * corpus.val.n_tokens / corpus.val.n_bytes
    result |= {"name": args.name, "seed": args.seed, "budget": args.seconds}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
