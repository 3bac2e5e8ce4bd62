"""Version, errors, configuration and presets: plain data that every other module may read."""

import dataclasses
import math
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mmrec.errors import InputError, did_you_mean

VERSION = "0.1.0"
LARGEST = 10**15  # of whole numbers: a size, and what it is multiplied with, stays countable


def _require(good: bool, rule: str, got: object) -> None:
    if not good:
        raise InputError(f"{rule}; got {got}")


def _require_count(name: str, value: object) -> None:
    good = isinstance(value, int) and 1 <= value <= LARGEST
    _require(good, f"{name} must be a whole number from 1 to 10^15", value)


def check_reading(max_bytes: int, val_share: float) -> None:
    """Raise InputError for a limit or a split that is none."""
    _require(0 <= max_bytes <= LARGEST, "max_bytes must lie in 0 to 10^15", max_bytes)
    _require(0 < val_share <= 0.5, "val_share must lie in (0, 0.5]", val_share)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one MM-Rec model."""

    width: int = 128
    """D, the size of the residual stream and of the short-term state."""
    depth: int = 4
    """Number of layers."""
    heads: int = 4
    """H, heads of the long-term memory; each is a (D/H, D/H) matrix."""
    vocab_size: int = 5000
    """Number of token ids; sets the size of the tied embedding."""
    layers: str = "b"
    """The memories of each layer, one letter a layer and repeated to the depth: ``s`` short-term,
    ``l`` long-term, ``b`` both, ``n`` short-term without its recurrent weight (a linear scan)."""
    blocks: int = 1
    """Diagonal blocks of the recurrent weight W_g; 1 is a full (D, D) matrix."""
    ffn: float = 5.5
    """Feed-forward hidden size as a multiple of the width."""
    conv: int = 4
    """Taps of the causal depthwise convolution; 1 leaves it out."""
    dropout: float = 0.0
    """Probability of zeroing an element of each branch's output while training; rows of runs of
    tokens are left out twice as often."""
    ngrams: int = 0
    """Rows of the embedding of the last two, three … tokens, which share them by a hash; 0 is
    none."""
    runs: int = 3
    """Tokens of the longest run that has a row."""
    horizon: int = 256
    """Longest time constant, in tokens, given to the memories at initialisation."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "vocab_size", "blocks", "conv", "horizon"):
            value = getattr(self, name)
            _require_count(name, value)
        _require(
            self.width % self.heads == 0, f"heads must divide the width {self.width}", self.heads
        )
        _require(
            self.width % self.blocks == 0, f"blocks must divide the width {self.width}", self.blocks
        )
        _require(self.ngrams >= 0, "ngrams must be >= 0", self.ngrams)
        _require(2 <= self.runs <= 5, "runs must lie in 2 to 5", self.runs)
        _require(0 <= self.dropout < 1, "dropout must lie in [0, 1)", self.dropout)
        _require(0 < self.ffn <= 64, "ffn must lie in (0, 64]", self.ffn)
        good = bool(self.layers) and set(self.layers) <= set("slbn")
        _require(good, "layers must be letters out of 's', 'l', 'b', 'n'", repr(self.layers))

    @property
    def head_width(self) -> int:
        """P = D / H."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Feed-forward hidden size F."""
        return int(self.width * self.ffn)

    @property
    def kinds(self) -> str:
        """One letter for each of the layers, ``layers`` repeated to the depth."""
        return (self.layers * -(-self.depth // len(self.layers)))[: self.depth]


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. One of steps, epochs and minutes sets the length of the run."""

    data: str = "stdlib"
    """Corpus name, file, folder, glob, or a prepared corpus file."""
    text_field: str = ""
    """Field of a record, or column of a table, that holds the text; empty is ``text``."""
    skip_bad: bool = False
    """Pass over broken records and files that are not UTF-8, and count them."""
    max_bytes: int = 0
    """Read no more text than this, in bytes; 0 reads everything."""
    val_share: float = 0.1
    """Share of the text that is kept for validation."""
    val_file: str = ""
    """Source of the whole validation text; empty keeps a share of ``data``."""
    tokenizer: str = "bpe"
    """``bpe``, ``char`` or ``byte``."""
    vocab: int = 0
    """Vocabulary asked of ``bpe``; 0 takes the preset's."""
    grow_from: str = ""
    """Run or checkpoint that weights and tokenizer come from; empty starts from nothing."""
    freeze: str = ""
    """What keeps its weights, joined by commas: ``embeddings``, ``memory`` (all of a layer but its
    feed-forward), ``layers:0-2``."""
    layer_decay: float = 1.0
    """Rates of a layer as a share of those of the layer above; the embeddings come lowest."""
    lora: int = 0
    """Rank of the factors learnt beside frozen weights (LoRA); 0 learns the weights themselves."""
    lora_alpha: float = 16.0
    """What the product of the factors counts is this over the rank."""
    replay: float = 0.0
    """Share of the windows of a batch that come from ``replay_data``, against forgetting."""
    replay_data: str = ""
    """Text of an earlier training, under the same tokenizer."""
    steps: int | None = None
    """Optimizer steps."""
    epochs: float | None = None
    """Passes over the training split."""
    minutes: float | None = None
    """Wall-clock minutes of training, validation not counted."""
    batch: int = 16
    """Windows in one micro-batch."""
    seq_len: int = 256
    """Tokens in a window."""
    state: str = "window"
    """Where the memories start empty: at each ``window``; at each ``document`` in it, too; or, with
    ``carry``, at each document only, windows going on where the ones before them ended."""
    accumulate: int = 1
    """Micro-batches in one optimizer step."""
    recompute: bool = False
    """Keep only what goes into each layer, and compute the rest again in backward: less memory."""
    lr: float = 1e-2
    """Peak learning rate of AdamW, which moves embeddings, norms and biases."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon, which moves the weight matrices."""
    min_lr: float = 0.0
    """Learning rate at the end, as a fraction of the peak."""
    warmup: float = 0.03
    """Warmup as a fraction of the run."""
    schedule: str = "linear"
    """``cosine``, ``linear`` or ``constant``, after the warmup."""
    weight_decay: float = 0.1
    """Weight decay, on matrices only, a share of muon_lr."""
    table_decay: float = 1.0
    """Weight decay of the table of pairs and triples of tokens, a share of lr."""
    beta1: float = 0.9
    """AdamW first-moment decay."""
    beta2: float = 0.95
    """AdamW second-moment decay."""
    clip: float = 1.0
    """Largest global gradient norm."""
    precision: str = "auto"
    """``float32``, ``bfloat16`` (matrix products only; recurrences stay float32), or ``auto``:
    bfloat16 where a probe finds it faster on this processor."""
    seed: int = 0
    """Seed of initialisation, data order and dropout."""
    eval_every: int = 200
    """Steps between validations on the fixed subset."""
    eval_tokens: int = 32768
    """Tokens in the fixed validation subset, eight runs spread over the split."""
    save_every: int = 500
    """Steps between step-N checkpoints."""
    keep: int = 2
    """How many step-N checkpoints to keep; best and last are always kept."""
    patience: int = 0
    """Stop after this many validations without a new best; 0 never stops early."""
    on_nan: str = "stop"
    """When a loss or gradient is NaN or infinite: ``stop``, ``skip`` the step, or ``rollback`` to
    the newest checkpoint with other data and half the rate."""
    out: str = ""
    """Run folder; empty chooses ``runs/<preset>-<corpus>``."""

    def __post_init__(self) -> None:
        for name in ("batch", "seq_len", "accumulate", "eval_every", "eval_tokens", "save_every"):
            value = getattr(self, name)
            _require_count(name, value)
        for name in ("lr", "muon_lr", "clip"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, f"{name} must be finite and > 0", value)
        for name in ("steps", "epochs", "minutes"):
            value = getattr(self, name)
            good = value is None or 0 < value <= LARGEST
            _require(good, f"{name} must be > 0 and at most 10^15", value)
        given = [n for n in ("steps", "epochs", "minutes") if getattr(self, n) is not None]
        _require(
            len(given) <= 1, "only one of steps, epochs, minutes may be given", ", ".join(given)
        )
        _require(0 <= self.warmup <= 1, "warmup must lie in [0, 1]", self.warmup)
        _require(0 <= self.min_lr <= 1, "min_lr must lie in [0, 1]", self.min_lr)
        for name in ("weight_decay", "table_decay"):
            value = getattr(self, name)
            good = math.isfinite(value) and value >= 0
            _require(good, f"{name} must be finite and >= 0", value)
        for name in ("beta1", "beta2"):
            _require(
                0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1)", getattr(self, name)
            )
        for name in ("keep", "patience", "vocab"):
            _require(getattr(self, name) >= 0, f"{name} must be >= 0", getattr(self, name))
        check_reading(self.max_bytes, self.val_share)
        good = 0 < self.layer_decay <= 1
        _require(good, "layer_decay must lie in (0, 1]", self.layer_decay)
        _require(self.lora >= 0, "lora must be >= 0, the rank of the factors", self.lora)
        good = math.isfinite(self.lora_alpha) and self.lora_alpha > 0
        _require(good, "lora_alpha must be finite and > 0", self.lora_alpha)
        good = not self.lora or bool(self.grow_from)
        _require(good, "lora needs grow_from, the model whose weights stay", repr(""))
        _require(0 <= self.replay < 1, "replay must lie in [0, 1)", self.replay)
        good = not self.replay or bool(self.replay_data)
        _require(good, "replay needs replay_data, the text to take windows of", repr(""))
        good = not self.replay or self.state != "carry"
        _require(good, "replay needs state window or document", repr(self.state))
        _require(0 <= self.seed < 1 << 63, "seed must lie in 0 to 2^63 - 1", self.seed)
        for name, known in (
            ("schedule", ["cosine", "linear", "constant"]),
            ("precision", ["auto", "float32", "bfloat16"]),
            ("tokenizer", ["bpe", "char", "byte"]),
            ("on_nan", ["stop", "skip", "rollback"]),
            ("state", ["window", "document", "carry"]),
        ):
            value = getattr(self, name)
            _require(value in known, f"{name} must be one of {', '.join(known)}", repr(value))
        good = self.on_nan != "rollback" or self.keep >= 1
        _require(good, "keep must be >= 1, or on_nan rollback has nowhere to return to", self.keep)


# Three layers of linear scan to one of long-term memory learnt most of stdlib in equal time, by one
# seed; only tiny was measured (decisions.md).
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(128, 4, 4, 5_000, "nnnl", ffn=3.5, ngrams=4_096, horizon=256),
    "mini": ModelConfig(256, 6, 4, 8_192, "nnl", ffn=4.0, ngrams=8_192, horizon=512),
    "small": ModelConfig(512, 8, 8, 16_384, "nnnl", ffn=5.5, ngrams=16_384, horizon=512),
    "base": ModelConfig(1024, 12, 16, 32_000, "nnnl", ffn=5.5, ngrams=32_768, horizon=1024),
    "medium": ModelConfig(2048, 16, 32, 32_000, "nnnl", ffn=5.5, ngrams=65_536, horizon=2048),
    "large": ModelConfig(3072, 20, 48, 32_000, "nnnl", ffn=5.5, ngrams=65_536, horizon=2048),
    "7b": ModelConfig(4096, 24, 64, 32_000, "nnnl", ffn=6.0, ngrams=65_536, horizon=4096),
}

# Tokens that tiny trains on in about five minutes on two cores; fewer where they would be more than
# four passes over the text, by which it is learnt by heart (decisions.md).
DEFAULT_TOKENS, DEFAULT_EPOCHS, LEAST_STEPS = 1100 * 4096, 4, 100


def preset(name: str, tokenizer: str = "bpe") -> ModelConfig:
    """Return the preset of that name, as it is for a tokenizer.

    Characters and bytes need a small embedding and say little each: they get runs of four, and
    twice the rows for them, which leaves tiny as large as it is with bpe (decisions.md).

    Raises InputError, naming the nearest, if there is none.
    """
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise InputError(
            f"unknown preset {name!r}: expected one of {known}{did_you_mean(name, list(PRESETS))}"
        )
    made = PRESETS[name]
    return made if tokenizer == "bpe" else replace(made, runs=4, ngrams=2 * made.ngrams)


def train_settings(name: str, tokenizer: str = "bpe") -> dict[str, Any]:
    """Return the settings of TrainConfig that a preset trains with and its defaults are not.

    tiny learns more of the same tokens from windows of half the length, so twice the steps, where
    a token is some four characters. In mini Muon's share of a step takes back what that brings, and
    in larger presets its share is larger still (decisions.md).
    """
    return {"seq_len": 128} if name == "tiny" and tokenizer == "bpe" else {}


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Build a config dataclass from plain values; unknown keys and wrong types are InputErrors."""
    known = {f.name: f for f in fields(cls)}
    made = {}
    for key, value in values.items():
        if key not in known:
            raise InputError(
                f"unknown setting {key!r} for {cls.__name__}{did_you_mean(key, list(known))}"
            )
        want = str(known[key].type)
        kind = bool if isinstance(value, bool) else type(value)
        if kind is int and "float" in want:
            value, kind = float(value), float
        if not (kind.__name__ in want or (value is None and "None" in want)):
            raise InputError(f"{key} must be of type {want}; got {value!r}")
        made[key] = value
    return cls(**made)


def load_toml(path: Path) -> dict[str, dict[str, Any]]:
    """Read a config file with the tables [model] and [train]. Raises InputError on any fault."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read config file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path} is not TOML: {error}") from None
    extra = [
        k
        for k, v in tables.items()
        if k not in ("model", "train", "preset") or (k != "preset" and not isinstance(v, dict))
    ]
    if extra:
        raise InputError(
            f"config file {path} may hold preset, [model] and [train]; got {extra[0]!r}"
        )
    return tables


def to_toml(model: ModelConfig, train: TrainConfig, preset_name: str) -> str:
    """Write the resolved configuration as TOML that load_toml reads back."""

    def line(key: str, value: Any) -> str:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
        if isinstance(value, str):
            escaped = value.replace("\\", "\\\\").replace('"', '\\"')
            text = f'"{escaped}"'
        return f"{key} = {text}"

    parts = [line("preset", preset_name)]
    for title, config in (("model", model), ("train", train)):
        parts.append(f"\n[{title}]")
        parts += [line(k, v) for k, v in dataclasses.asdict(config).items() if v is not None]
    return "\n".join(parts) + "\n"
