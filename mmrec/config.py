"""Settings: each one is declared here once, with its type, default, help, bounds and choices.

The command line's options, the checks, the TOML file, the error messages and the configuration
page of the documentation are derived from these declarations.

A setting has two names. In code and in TOML it stands in a section: ``config.optimizer.lr``, or
``lr`` in the table ``[optimizer]``. On the command line and in ``mmrec.train(...)`` names are flat:
``--lr`` and ``lr=``. Flat names are unique over all sections.
"""

import dataclasses
import datetime
import math
import time
import tomllib
import types
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from mmrec.errors import InputError, did_you_mean

VERSION = "0.12.0"
MAX_COUNT = 10**15
"""Largest whole number that a setting may have, so that products of sizes stay countable."""


@dataclass(frozen=True)
class Setting:
    """The declaration of one setting."""

    name: str
    """Field name, unique within its section."""
    flat_name: str
    """Name on the command line (with dashes) and in the Python API."""
    section: str
    """Table of the TOML file."""
    type: type
    """bool, int, float or str."""
    optional: bool
    """Whether None is allowed; it means "not given"."""
    default: Any
    help: str
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: bool = False
    exclusive_maximum: bool = False
    choices: tuple[str, ...] = ()
    metavar: str | None = None

    @property
    def flag(self) -> str:
        """The option of the command line, such as ``--seq-len``."""
        return f"--{self.flat_name.replace('_', '-')}"

    def as_arguments(self, value: Any) -> list[str]:
        """The option and its value, as words of a command line; none of a flag that is off."""
        if self.type is bool:
            return [self.flag] if value else []
        text = repr(value) if isinstance(value, float) else str(value)
        return [f"{self.flag}={text}"] if text.startswith("-") else [self.flag, text]

    @property
    def rule(self) -> str:
        """What a value must be, in words; empty if every value of the type will do."""
        if self.choices:
            return f"must be one of {', '.join(self.choices)}"
        if self.minimum is None:
            return ""
        if self.maximum is None:
            sign = ">" if self.exclusive_minimum else ">="
            return f"must be finite and {sign} {self.minimum:g}"
        if self.type is int:
            return (
                f"must be a whole number from {_integer(self.minimum)} to {_integer(self.maximum)}"
            )
        left = "(" if self.exclusive_minimum else "["
        right = ")" if self.exclusive_maximum else "]"
        return f"must lie in {left}{self.minimum:g}, {_integer(self.maximum)}{right}"

    def check(self, value: Any) -> Any:
        """Check a value.

        Returns:
            The value. A whole number becomes a float where the setting is a float.

        Raises:
            InputError: the value has another type, lies outside the bounds, or is no choice.
        """
        if value is None and self.optional:
            return None
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            if abs(value) > 1 << 1023:
                raise InputError(
                    f"{self.flat_name} {self.rule or 'must be finite'}; got {str(value)[:40]}…"
                )
            value = float(value)
        if not isinstance(value, self.type) or (self.type is int and isinstance(value, bool)):
            wanted = self.type.__name__ + (" or left out" if self.optional else "")
            raise InputError(f"{self.flat_name} must be of type {wanted}; got {value!r}")
        if self.type is str and not _is_writable(str(value)):
            raise InputError(
                f"{self.flat_name} must be text in UTF-8 without a NUL, so that config.toml can "
                f"hold it; got {value!r}"
            )
        if self.rule and not self._is_allowed(value):
            shown = repr(value) if self.type is str else value
            hint = did_you_mean(str(value), self.choices) if self.choices else ""
            raise InputError(f"{self.flat_name} {self.rule}; got {shown}{hint}")
        return value

    def _is_allowed(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if not math.isfinite(value):
            return False
        lowest = -math.inf if self.minimum is None else self.minimum
        highest = math.inf if self.maximum is None else self.maximum
        if value == lowest and self.exclusive_minimum:
            return False
        if value == highest and self.exclusive_maximum:
            return False
        return bool(lowest <= value <= highest)


def _is_writable(text: str) -> bool:
    """Whether a TOML file can hold a text. A file name that is not UTF-8 has half surrogates."""
    return not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text)


def _integer(value: float) -> str:
    """Write a bound as text: 10^15 and 2^63 - 1 instead of their digits."""
    if value == MAX_COUNT:
        return "10^15"
    return "2^63 - 1" if value == (1 << 63) - 1 else f"{value:g}"


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    exclusive_minimum: bool = False,
    exclusive_maximum: bool = False,
    choices: tuple[str, ...] = (),
    flat_name: str | None = None,
    metavar: str | None = None,
) -> Any:
    """Declare a field of a section. The arguments are the attributes of ``Setting``."""
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "minimum": minimum,
            "maximum": maximum,
            "exclusive_minimum": exclusive_minimum,
            "exclusive_maximum": exclusive_maximum,
            "choices": choices,
            "flat_name": flat_name,
            "metavar": metavar,
        },
    )


def count(default: int | None, help: str, minimum: int = 1, **options: Any) -> Any:
    """Declare a whole number from ``minimum`` to 10^15."""
    return setting(default, help, minimum=minimum, maximum=MAX_COUNT, **options)


@dataclass(frozen=True)
class Section:
    """A group of settings: a table of the TOML file and a panel of ``--help``."""

    section: ClassVar[str] = ""
    """Name of the table."""
    title: ClassVar[str] = ""
    """Heading of the panel."""

    def __post_init__(self) -> None:
        for declared in self.settings().values():
            value = declared.check(getattr(self, declared.name))
            object.__setattr__(self, declared.name, value)

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        """The declarations of the section by field name."""
        if "_settings" not in cls.__dict__:
            hints = typing.get_type_hints(cls)
            cls._settings = {f.name: _declared(cls, f, hints[f.name]) for f in fields(cls)}  # type: ignore[attr-defined]
        declared: dict[str, Setting] = cls._settings  # type: ignore[attr-defined]
        return declared

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build a section from plain values.

        Raises:
            InputError: a key is unknown, or a value is not as declared.
        """
        known = cls.settings()
        for key in values:
            if key not in known:
                hint = did_you_mean(key, known)
                raise InputError(f"unknown setting {key!r} in [{cls.section}]{hint}")
        return cls(**values)


def _declared(cls: type[Section], field: Any, hint: Any) -> Setting:
    optional = isinstance(hint, types.UnionType)
    kind = next(t for t in typing.get_args(hint) if t is not types.NoneType) if optional else hint
    options = dict(field.metadata)
    flat_name = options.pop("flat_name") or field.name
    return Setting(field.name, flat_name, cls.section, kind, optional, field.default, **options)


@dataclass(frozen=True)
class ModelConfig(Section):
    """The shape of one MM-Rec model."""

    section: ClassVar[str] = "model"
    title: ClassVar[str] = "Model (defaults: the preset's)"

    width: int = count(128, "D, the size of the residual stream and of the recurrent state.")
    depth: int = count(4, "Number of layers.")
    heads: int = count(
        4, "H, number of heads of the gated delta rule; each has a (D/H, D/H) matrix state."
    )
    vocab_size: int = count(
        5000, "V, number of token ids. Training sets it to the size of the tokenizer."
    )
    layer_types: str = setting(
        "b",
        "Types of the layers, one letter per layer, repeated up to the depth: s gated recurrence, "
        "n gated recurrence without its recurrent weight (minGRU), l gated delta rule, b both.",
        metavar="LETTERS",
    )
    recurrent_blocks: int = count(
        1, "Diagonal blocks of the recurrent weight; 1 is a full (D, D) matrix."
    )
    ffn_multiplier: float = setting(
        5.5,
        "Width of the feed-forward network as a multiple of the model's width.",
        minimum=0,
        maximum=64,
        exclusive_minimum=True,
    )
    conv_width: int = count(4, "Width of the causal depthwise convolution; 1 leaves it out.")
    dropout: float = setting(
        0.0,
        "Dropout probability of each residual branch. N-gram embeddings use twice as much.",
        minimum=0,
        maximum=1,
        exclusive_maximum=True,
    )
    ngram_buckets: int = count(
        0,
        "Rows of the hashed n-gram embedding; 0 leaves it out. With more than 65,536 a step "
        "updates only those that it has read.",
        minimum=0,
    )
    max_ngram: int = setting(
        3, "Longest n-gram that has an embedding, in tokens.", minimum=2, maximum=5
    )
    max_timescale: int = count(
        256, "Longest time constant of the decays at initialisation, in tokens."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "recurrent_blocks"):
            divisor = getattr(self, name)
            if self.width % divisor:
                raise InputError(f"{name} must divide the width {self.width}; got {divisor}")
        if self.ffn_width < 1:
            raise InputError(
                f"ffn_multiplier times the width {self.width} must be at least 1; got "
                f"{self.ffn_multiplier:g}"
            )
        if not self.layer_types or not set(self.layer_types) <= set("slbn"):
            raise InputError(
                f"layer_types must be letters out of 's', 'l', 'b', 'n'; got {self.layer_types!r}"
            )

    @property
    def head_width(self) -> int:
        """P = D / H."""
        return self.width // self.heads

    @property
    def ffn_width(self) -> int:
        """F, the width of the feed-forward network."""
        return int(self.width * self.ffn_multiplier)

    @property
    def has_large_ngram_table(self) -> bool:
        """Whether the n-gram embedding has so many rows that a step should touch only those read.

        Its gradients can then be sparse, and its optimizer is RMSprop by row (decision 048).
        """
        return self.ngram_buckets > MAX_DENSE_ROWS

    @property
    def resolved_layer_types(self) -> str:
        """One letter for each layer: ``layer_types`` repeated to the depth."""
        repeats = math.ceil(self.depth / len(self.layer_types))
        return (self.layer_types * repeats)[: self.depth]


MAX_DENSE_ROWS = 65_536
"""Rows of an n-gram embedding up to which AdamW updates all of them at each step."""
NGRAM_HASH = (
    (1_000_003, 1),
    (998_244_353, 2_654_435_761),
    (1_299_709, 40_503),
    (15_485_863, 69_069),
)
"""Hash of an n-gram: key_n = token[-n] * multiplier + key_{n-1}, and its row of the table is
mix(key_n * mixer) % buckets. One (multiplier, mixer) pair per n, from n = 2 on."""


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a model by the names that ``mmrec.model.Model`` gives them."""
    width, ffn = config.width, config.ffn_width
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, width)}
    if config.ngram_buckets:
        shapes["ngram_embedding"] = (config.ngram_buckets, width)
    for i, layer_type in enumerate(config.resolved_layer_types):
        layer: dict[str, tuple[int, ...]] = {"conv_weight": (config.conv_width, width)}
        has_recurrence, has_delta_rule = layer_type in "sbn", layer_type in "lb"
        projections = width * (3 * has_recurrence + 3 * has_delta_rule + 1)
        layer["in_proj.weight"] = (projections + 2 * config.heads * has_delta_rule, width)
        if has_recurrence:
            layer["forget_bias"] = (width,)
        if layer_type in "sb":
            block = width // config.recurrent_blocks
            layer["recurrent_weight"] = (config.recurrent_blocks, block, block)
            layer["recurrence_norm.weight"] = (width,)
        if has_delta_rule:
            layer["delta_decay_bias"] = (config.heads,)
            layer["delta_norm.weight"] = (width,)
        layer["out_proj.weight"] = (width, width)
        layer["ffn_norm.weight"] = (width,)
        layer["up_proj.weight"], layer["down_proj.weight"] = (ffn, width), (width, ffn)
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"norm.weight": (width,)}


def state_layout(
    config: ModelConfig,
) -> list[list[tuple[str, int, int, tuple[int, ...]]]]:
    """Where the recurrent state of each layer lies in one flat array.

    Returns:
        For each layer its fields as (name, begin, end, shape), named as in
        ``mmrec.model.LayerState``. The last end is the size of the whole state.
    """
    layers, end = [], 0
    for layer_type in config.resolved_layer_types:
        fields: dict[str, tuple[int, ...]] = {"conv_state": (config.conv_width - 1, config.width)}
        if layer_type in "sbn":
            fields["hidden_state"] = (config.width,)
        if layer_type in "lb":
            fields["delta_state"] = (config.heads, config.head_width, config.head_width)
        layer = []
        for name, shape in fields.items():
            begin, end = end, end + math.prod(shape)
            layer.append((name, begin, end, shape))
        layers.append(layer)
    return layers


@dataclass(frozen=True)
class DataConfig(Section):
    """Which text is read, how it is split and tokenised, and how windows are drawn from it."""

    section: ClassVar[str] = "data"
    title: ClassVar[str] = "Data"

    source: str = setting(
        "stdlib",
        "Text to train on: stdlib, shakespeare, a file, a folder, a glob, - for standard input, "
        "hf:NAME, a prepared .h5 corpus, or a mixture such as 3:code/,1:book.txt.",
        flat_name="data",
    )
    text_field: str = setting("", "Field or column of a record that holds the text; empty: text.")
    skip_bad: bool = setting(False, "Skip broken records and files that are not text; count them.")
    max_bytes: int = count(0, "Read at most this many bytes of text; 0 reads all.", minimum=0)
    val_fraction: float = setting(
        0.1,
        "Share of the text that is held out for validation.",
        minimum=0,
        maximum=0.5,
        exclusive_minimum=True,
    )
    val_file: str = setting("", "Source of the validation text; empty holds out a share of --data.")
    tokenizer: str = setting("bpe", "Tokenizer.", choices=("bpe", "char", "byte"))
    vocab: int = count(0, "Vocabulary size of bpe; 0 takes the preset's.", minimum=0)
    batch_size: int = count(16, "Sequences per batch.")
    seq_len: int = count(256, "Tokens per sequence; tiny with bpe takes 128.")
    state: str = setting(
        "window",
        "Where the recurrent state is reset: at each window; at each window and document; or, with "
        "carry, at each document only, so that windows continue where the ones before ended.",
        choices=("window", "document", "carry"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source:
            raise InputError("data must name a text; got ''")


@dataclass(frozen=True)
class LengthConfig(Section):
    """How long training lasts. At most one of the settings is given."""

    section: ClassVar[str] = "length"
    title: ClassVar[str] = "Length"

    steps: int | None = count(None, "Optimizer steps.")
    epochs: float | None = setting(
        None, "Passes over the training text.", minimum=0, maximum=MAX_COUNT, exclusive_minimum=True
    )
    minutes: float | None = setting(
        None,
        "Minutes of training, validation not counted.",
        minimum=0,
        maximum=MAX_COUNT,
        exclusive_minimum=True,
    )
    until: str | None = setting(
        None,
        "Train until this time: 07:00, the next time that a clock shows it, or 2026-12-01 07:00.",
        metavar="TIME",
    )
    """Held as a moment in time, with its offset from UTC."""

    def __post_init__(self) -> None:
        for name in self.settings():
            if name != "until" and str(getattr(self, name)).startswith("+"):
                raise InputError(
                    f"{name} {getattr(self, name)} is added to what a run has trained, so it needs "
                    "--resume; a new run takes the number alone"
                )
        super().__post_init__()
        given = [name for name in self.settings() if getattr(self, name) is not None]
        if len(given) > 1:
            names = ", ".join(self.settings())
            raise InputError(f"only one of {names} may be given; got {', '.join(given)}")
        if self.until is not None:
            object.__setattr__(self, "until", resolve_moment(self.until))

    def describe(self) -> str:
        """The length in words, such as ``1,000 steps``."""
        if self.steps is not None:
            return f"{self.steps:,} step{'s' * (self.steps != 1)}"
        if self.until is not None:
            return f"until {self.until}"
        for name in ("epochs", "minutes"):
            if (value := getattr(self, name)) is not None:
                return f"{value:.6g} {name}"
        return "the default length"


def resolve_moment(text: str) -> str:
    """Resolve a time of day or a local date and time to a moment.

    Args:
        text: ``07:00``, the next time that a clock shows it; ``2026-12-01 07:00``, seconds may
            follow; or what this function returns.

    Returns:
        The moment as ``2026-12-01 07:00:00+01:00``.

    Raises:
        InputError: the text is neither a time nor a date and a time.
    """
    now = datetime.datetime.now().astimezone()
    try:
        if "-" in text:
            moment = datetime.datetime.fromisoformat(text)
            if len(text) <= len("2026-12-01"):
                raise ValueError("a date alone has no time")
        else:
            time_of_day = datetime.time.fromisoformat(f"0{text}" if text[1:2] == ":" else text)
            if time_of_day.tzinfo is not None:
                raise ValueError("a time of day is that of this machine")
            moment = datetime.datetime.combine(now.date(), time_of_day)
            if moment <= now.replace(tzinfo=None):
                moment += datetime.timedelta(days=1)
        moment = moment.astimezone()
    except (ValueError, OverflowError, OSError):
        raise InputError(
            f"until must be a time such as 07:00, or a date and a time such as 2026-12-01 07:00; "
            f"got {text!r}"
        ) from None
    return moment.isoformat(" ", "seconds")


def seconds_until(moment: str) -> float:
    """Seconds from now to a moment as ``resolve_moment`` returns it; negative if it has passed."""
    return datetime.datetime.fromisoformat(moment).timestamp() - time.time()


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """How the weights are updated: Muon for matrices, AdamW for everything else."""

    section: ClassVar[str] = "optimizer"
    title: ClassVar[str] = "Optimizer"

    lr: float = setting(
        1e-2,
        "Peak learning rate of AdamW: embeddings, norms and biases.",
        minimum=0,
        exclusive_minimum=True,
    )
    matrix_lr: float = setting(
        0.02,
        "Peak learning rate of Muon: the weight matrices of the layers.",
        minimum=0,
        exclusive_minimum=True,
    )
    final_lr_ratio: float = setting(
        0.0, "Learning rate at the end, as a share of the peak.", minimum=0, maximum=1
    )
    warmup: float = setting(0.03, "Warmup, as a share of the run.", minimum=0, maximum=1)
    schedule: str = setting(
        "linear",
        "Learning-rate schedule after warmup; wsd (warmup, stable, decay) stays at the peak until "
        "the last part of the run.",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    decay_fraction: float = setting(
        0.2,
        "Share of the run, at its end, in which the rate of schedule wsd falls.",
        minimum=0,
        maximum=1,
        exclusive_minimum=True,
    )
    """Source of the default: Hägele et al. 2024 (arXiv:2405.18392)."""
    weight_decay: float = setting(
        0.1, "Weight decay of the matrices, multiplied by matrix_lr.", minimum=0
    )
    ngram_weight_decay: float = setting(
        1.0,
        "Weight decay of the n-gram embedding, multiplied by lr. With more than 65,536 rows a row "
        "decays when it is read.",
        minimum=0,
    )
    beta1: float = setting(
        0.9, "AdamW's first-moment decay.", minimum=0, maximum=1, exclusive_maximum=True
    )
    beta2: float = setting(
        0.95, "AdamW's second-moment decay.", minimum=0, maximum=1, exclusive_maximum=True
    )
    max_grad_norm: float = setting(
        1.0,
        "Largest global gradient norm; larger gradients are clipped.",
        minimum=0,
        exclusive_minimum=True,
    )
    ema_decay: float = setting(
        0.0,
        "Decay per step of an exponential moving average of the weights, which takes their place "
        "in validation and in use; 0 keeps none.",
        minimum=0,
        maximum=1,
        exclusive_maximum=True,
    )
    gradient_accumulation_steps: int = count(1, "Batches per optimizer step.")
    activation_checkpointing: bool = setting(
        False, "Recompute activations in backward: less memory, more time, the same bits."
    )
    precision: str = setting(
        "auto",
        "Matrix products in float32 or bfloat16; auto takes bfloat16 where the processor has "
        "instructions for it (AVX-512 BF16, AMX, Arm BF16). "
        "Recurrences always run in float32.",
        choices=("auto", "float32", "bfloat16"),
    )
    replicas: str = setting(
        "auto",
        "What computes a core's share of a batch, where a model below 64 M parameters trains on "
        "several cores: threads of one process, or a process for each core, which starts in some "
        "seconds and is faster. auto takes threads first, and processes for the rest of a run of "
        "more than half a minute. The same bits.",
        choices=("auto", "threads", "processes"),
    )
    sampled_softmax: int = count(
        0,
        "Compare each prediction with the targets of its batch and this many drawn tokens, which "
        "stand for the rest of the vocabulary: less work per step for a large vocabulary, and a "
        "loss that is an estimate. 0 compares with the whole vocabulary.",
        minimum=0,
    )
    """Source: Jean et al. 2015 (arXiv:1412.2007, section 3)."""
    seed: int = setting(
        0,
        "Seed of the initial weights, the data order and dropout.",
        minimum=0,
        maximum=(1 << 63) - 1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule == "wsd" and self.warmup + self.decay_fraction > 1:
            raise InputError(
                "warmup and decay_fraction of schedule wsd must be at most 1 together; got "
                f"{self.warmup:g} and {self.decay_fraction:g}"
            )


@dataclass(frozen=True)
class FinetuneConfig(Section):
    """Training that begins from an earlier model."""

    section: ClassVar[str] = "finetune"
    title: ClassVar[str] = "Fine-tuning"

    initialize_from: str = setting(
        "",
        "Run, checkpoint or pretrained model whose weights and tokenizer training begins from. It "
        "is grown to PRESET if PRESET is larger.",
    )
    from_scratch: bool = setting(
        False, "With auto: begin from no pretrained model, whatever the text."
    )
    freeze: str = setting(
        "",
        "Parameters that are not trained, joined by commas: embeddings, memory (a layer without "
        "its feed-forward network), layers:0-2.",
    )
    layerwise_lr_decay: float = setting(
        1.0,
        "Learning rate of each layer as a share of the layer above; embeddings come lowest.",
        minimum=0,
        maximum=1,
        exclusive_minimum=True,
    )
    lora_rank: int = count(
        0, "Rank of LoRA factors beside frozen weights; 0 trains the weights.", minimum=0
    )
    lora_alpha: float = setting(
        16.0, "LoRA's alpha: factors are scaled by alpha / rank.", minimum=0, exclusive_minimum=True
    )
    replay_fraction: float = setting(
        0.0,
        "Share of each batch that is drawn from the earlier text, against forgetting.",
        minimum=0,
        maximum=1,
        exclusive_maximum=True,
    )
    replay_data: str = setting("", "The earlier text, under the same tokenizer.")


@dataclass(frozen=True)
class DistillationConfig(Section):
    """Training that learns what earlier models predict."""

    section: ClassVar[str] = "distillation"
    title: ClassVar[str] = "Distillation"

    teachers: str = setting(
        "",
        "Runs or checkpoints with the same tokenizer, joined by commas. The model learns the mean "
        "of their predictions.",
    )
    teacher_weight: float = setting(
        0.7,
        "Share of the loss that compares with the teachers; the rest compares with the text.",
        minimum=0,
        maximum=1,
        exclusive_minimum=True,
    )


@dataclass(frozen=True)
class EvaluationConfig(Section):
    """When a run validates, what it then writes, and when it saves and stops."""

    section: ClassVar[str] = "evaluation"
    title: ClassVar[str] = "Evaluation and saving"

    eval_every: int = count(200, "Steps between validations on a fixed subset.")
    eval_tokens: int = count(32768, "Tokens of the fixed validation subset.")
    patience: int = count(
        0, "Stop after this many validations without a new best; 0 never stops early.", minimum=0
    )
    save_every: int = count(500, "Steps between step-N checkpoints.")
    keep_checkpoints: int = count(
        2, "Number of step-N checkpoints to keep; best and last are always kept.", minimum=0
    )
    sample_prompt: str = setting(
        "",
        "Text that the model continues at each validation; of a model that chats, a message. "
        "Empty: the beginning of the validation text.",
        metavar="TEXT",
    )
    sample_tokens: int = count(
        64, "Tokens of the text that the model writes at each validation; 0 writes none.", minimum=0
    )
    on_nan: str = setting(
        "stop",
        "What to do when a loss or gradient is not finite: stop; skip the step; or rollback to the "
        "newest checkpoint, with other data and half the learning rate.",
        choices=("stop", "skip", "rollback"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_nan == "rollback" and self.keep_checkpoints < 1:
            raise InputError(
                "keep_checkpoints must be >= 1 with on_nan rollback, which returns to a "
                f"checkpoint; got {self.keep_checkpoints}"
            )


TRACKERS = ("tensorboard", "trackio")
"""Programs that show runs and to which runs can be sent. Each is an extra of the same name."""


@dataclass(frozen=True)
class OutputConfig(Section):
    """Where a run writes."""

    section: ClassVar[str] = "output"
    title: ClassVar[str] = "Output"

    out: str = setting("", "Run folder; empty: runs/PRESET-CORPUS.")
    log: str = setting(
        "",
        f"Programs that get the curves and texts, joined by commas: {', '.join(TRACKERS)}. Each is "
        "an extra of the same name.",
        metavar="NAMES",
    )
    html: bool = setting(False, "Write report.html at the end, the page of mmrec report.")

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.trackers
        for name in names:
            if name not in TRACKERS:
                raise InputError(
                    f"log must name some of {', '.join(TRACKERS)}, joined by commas; got "
                    f"{self.log!r}{did_you_mean(name, TRACKERS)}"
                )
        if len(set(names)) < len(names):
            raise InputError(f"log must name a program once; got {self.log!r}")

    @property
    def trackers(self) -> list[str]:
        """The names in ``log``."""
        return [name.strip() for name in self.log.split(",")] if self.log else []


@dataclass(frozen=True)
class SamplingConfig(Section):
    """How the next token is drawn. The settings apply in the order of the fields.

    Raises:
        InputError: a setting lies outside its range.
    """

    section: ClassVar[str] = "sampling"
    title: ClassVar[str] = "Sampling"

    repetition_penalty: float = setting(
        1.0,
        "Divide the positive logits, and multiply the negative logits, of the tokens among the "
        "last 256; 1 is off.",
        minimum=0,
        exclusive_minimum=True,
    )
    """Source: Keskar et al. 2019 (arXiv:1909.05858, section 4.1)."""
    frequency_penalty: float = setting(
        0.0,
        "Subtract this from the logit of a token for each time that it was generated; 0 is off.",
        minimum=-2,
        maximum=2,
    )
    presence_penalty: float = setting(
        0.0,
        "Subtract this from the logits of the tokens that were generated before; 0 is off.",
        minimum=-2,
        maximum=2,
    )
    temperature: float = setting(
        0.8, "Divide the logits; 0 always takes the most likely token.", minimum=0
    )
    top_k: int = count(0, "Keep the k most likely tokens; 0 is off.", minimum=0)
    top_p: float = setting(
        0.95,
        "Keep the fewest most likely tokens whose probabilities reach this sum; 1 is off.",
        minimum=0,
        maximum=1,
        exclusive_minimum=True,
    )
    """Source: Holtzman et al. 2020 (arXiv:1904.09751), nucleus sampling."""
    min_p: float = setting(
        0.0,
        "Drop tokens whose probability is below this share of the largest one; 0 is off.",
        minimum=0,
        maximum=1,
    )
    """Source: Nguyen et al. 2024 (arXiv:2407.01082)."""


@dataclass(frozen=True)
class AdaptationConfig(Section):
    """How a model learns from a text while it reads it."""

    section: ClassVar[str] = "adaptation"
    title: ClassVar[str] = "Adaptation"

    adapt_lr: float = setting(
        1e-4,
        "Learning rate of --adapt. 1e-3 helps more on a text that is unlike the training text, and "
        "harms on one that is like it.",
        minimum=0,
        exclusive_minimum=True,
    )


@dataclass(frozen=True)
class NeuralCacheConfig(Section):
    """The neural cache of a text that is read or written; see ``mmrec.inference.neural_cache``."""

    section: ClassVar[str] = "cache"
    title: ClassVar[str] = "Cache"

    neural_cache: int = setting(
        0,
        "Look up the newest N tokens of the text besides the recurrent state, and expect again "
        "what followed a place like this one. 4096 suits long texts; 0 is off.",
        minimum=0,
        maximum=100_000,
        metavar="N",
    )


@dataclass(frozen=True)
class ServerConfig(Section):
    """What a server allows. Each request is checked against these limits."""

    section: ClassVar[str] = "server"
    title: ClassVar[str] = "Limits"

    max_streams: int = count(32, "Texts that are generated together; others wait.")
    max_queue: int = count(
        256, "Texts that may wait; a request beyond them gets status 429.", minimum=0
    )
    max_tokens: int = count(4096, "Largest max_tokens of a request.")
    max_prompt_tokens: int = count(65536, "Longest prompt in tokens.")
    max_choices: int = count(32, "Most texts per request: prompts times n.")
    max_body_bytes: int = count(1 << 22, "Largest body of a request in bytes.")
    shutdown_timeout: float = setting(
        5.0,
        "Seconds that running requests have to end after SIGTERM or Ctrl-C.",
        minimum=0,
        maximum=86400,
    )


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained, in sections."""

    data: DataConfig = DataConfig()
    length: LengthConfig = LengthConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    distillation: DistillationConfig = DistillationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: OutputConfig = OutputConfig()

    def __post_init__(self) -> None:
        finetune = self.finetune
        if finetune.lora_rank and not finetune.initialize_from:
            raise InputError(
                "lora_rank needs initialize_from, the model whose weights stay frozen; got ''"
            )
        if finetune.replay_fraction and not finetune.replay_data:
            raise InputError(
                "replay_fraction needs replay_data, the text to draw windows from; got ''"
            )
        if finetune.replay_fraction and self.data.state == "carry":
            raise InputError("replay_fraction needs state window or document; got 'carry'")
        if self.distillation.teachers and self.data.state == "carry":
            raise InputError("teachers need state window or document; got 'carry'")
        if self.distillation.teachers and self.optimizer.sampled_softmax:
            raise InputError(
                "teachers need the whole vocabulary, sampled_softmax 0; got "
                f"{self.optimizer.sampled_softmax}"
            )

    @classmethod
    def from_flat(cls, settings: dict[str, Any]) -> Self:
        """Build a configuration from flat names. Settings left out keep their defaults.

        Raises:
            InputError: a name is unknown, or a value is not as declared.
        """
        return cls().replace(**settings)

    def replace(self, **settings: Any) -> Self:
        """Return a copy with some settings changed, by their flat names.

        Raises:
            InputError: a name is unknown, or a value is not as declared.
        """
        by_section: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            if name not in TRAIN_SETTINGS:
                raise InputError(f"unknown setting {name!r}{did_you_mean(name, TRAIN_SETTINGS)}")
            declared = TRAIN_SETTINGS[name]
            by_section.setdefault(declared.section, {})[declared.name] = value
        sections = {
            name: dataclasses.replace(getattr(self, name), **values)
            for name, values in by_section.items()
        }
        return dataclasses.replace(self, **sections)

    def flat(self) -> dict[str, Any]:
        """All settings by flat name."""
        return {
            name: getattr(getattr(self, s.section), s.name) for name, s in TRAIN_SETTINGS.items()
        }

    @classmethod
    def from_dict(cls, tables: dict[str, Any]) -> Self:
        """Build a configuration from nested plain values, as ``dataclasses.asdict`` gives them.

        Raises:
            InputError: a table or key is unknown, or a value is not as declared.
        """
        for name, table in tables.items():
            if name not in TRAIN_SECTIONS or not isinstance(table, dict):
                raise InputError(
                    f"a configuration may hold the tables {', '.join(TRAIN_SECTIONS)}; got {name!r}"
                )
        sections: dict[str, Any] = {n: TRAIN_SECTIONS[n].from_dict(t) for n, t in tables.items()}
        return cls(**sections)


TRAIN_SECTIONS: dict[str, type[Section]] = {
    cls.section: cls
    for cls in (
        DataConfig,
        LengthConfig,
        OptimizerConfig,
        FinetuneConfig,
        DistillationConfig,
        EvaluationConfig,
        OutputConfig,
    )
}
TRAIN_SETTINGS: dict[str, Setting] = {
    s.flat_name: s for cls in TRAIN_SECTIONS.values() for s in cls.settings().values()
}
"""Every setting of training by its flat name."""
MODEL_SETTINGS: dict[str, Setting] = ModelConfig.settings()
LENGTHS = tuple(LengthConfig.settings())
"""The settings of which at most one sets the length of a run."""
SOURCES = ("data", "val_file", "replay_data")
"""The settings that name texts. A resume may name other places with the same texts."""
RESUMABLE_SETTINGS = {*LENGTHS, *SOURCES, "out", "log", "html", "on_nan", "patience"}
"""The settings that a resume may change."""


# Only tiny's layer types were measured, by one seed: three minGRU layers per delta-rule layer
# learnt most of the Python standard library in equal time (docs/development/decisions).
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(128, 4, 4, 5_000, "nnnl", ffn_multiplier=3.5, ngram_buckets=4_096),
    "mini": ModelConfig(
        256, 6, 4, 8_192, "nnl", ffn_multiplier=4.0, ngram_buckets=8_192, max_timescale=512
    ),
    "small": ModelConfig(512, 8, 8, 16_384, "nnnl", ngram_buckets=16_384, max_timescale=512),
    "base": ModelConfig(1024, 12, 16, 32_000, "nnnl", ngram_buckets=32_768, max_timescale=1024),
    "medium": ModelConfig(2048, 16, 32, 32_000, "nnnl", ngram_buckets=65_536, max_timescale=2048),
    "large": ModelConfig(3072, 20, 48, 32_000, "nnnl", ngram_buckets=65_536, max_timescale=2048),
    "7b": ModelConfig(
        4096, 24, 64, 32_000, "nnnl", ffn_multiplier=6.0, ngram_buckets=65_536, max_timescale=4096
    ),
}
"""The model family, by name."""
AUTO = "auto"
"""In place of a preset: it is chosen by the size of the text and the time."""

FINETUNING_SETTINGS: dict[str, float] = {"lr": 5e-3, "matrix_lr": 1e-2, "warmup": 0.1}
"""What training that begins from a model of another text takes for these settings. Learning rates
are half those of training (docs/development/decisions)."""
PRETRAINED_SETTINGS: dict[str, float] = {"lr": 1.25e-3, "matrix_lr": 2.5e-3, "warmup": 0.1}
"""The same for a pretrained model, which has seen far more text and whose learning rate has reached
zero (decision 040)."""

WEIGHT_DTYPES = ("float32", "bfloat16", "int8")
"""How generation can hold the weights in memory; int8 has a scale per row."""
DEFAULT_MAX_TOKENS = 256
"""Tokens that ``generate`` writes at most, by default."""
DEFAULT_TOKENS = 1100 * 4096
"""Tokens of a run whose length is not given: about five minutes of tiny on two cores."""
DEFAULT_EPOCHS = 4
"""Passes after which a run of default length ends earlier: with more, a model without dropout
memorises its text (docs/development/decisions)."""
MIN_DEFAULT_STEPS = 100


def preset(name: str, tokenizer: str = "bpe") -> ModelConfig:
    """Return a preset's model configuration for a tokenizer.

    A character or byte carries little information, and its vocabulary needs a small embedding. So
    ``char`` and ``byte`` get n-grams of up to four tokens and twice the buckets; tiny then has as
    many parameters as with ``bpe`` (docs/development/decisions).

    Args:
        name: one of ``PRESETS``.
        tokenizer: ``bpe``, ``char`` or ``byte``.

    Raises:
        InputError: there is no such preset; the message names the most similar one.
    """
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS)
        raise InputError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}{hint}")
    config = PRESETS[name]
    if tokenizer == "bpe":
        return config
    return dataclasses.replace(config, max_ngram=4, ngram_buckets=2 * config.ngram_buckets)


def preset_train_settings(name: str, tokenizer: str = "bpe") -> dict[str, Any]:
    """Return the training settings, by flat name, in which a preset differs from the defaults.

    tiny learns more from the same number of bpe tokens with windows of half the length and twice
    the steps. In larger presets the optimizer's share of a step grows and takes that gain back
    (docs/development/decisions).
    """
    return {"seq_len": 128} if name == "tiny" and tokenizer == "bpe" else {}


@dataclass(frozen=True)
class ConfigFile:
    """The contents of a TOML configuration file, checked but not merged with defaults."""

    preset: str
    """Name of a preset; empty if the file names none."""
    model: dict[str, Any]
    """Settings of the model by name."""
    train: dict[str, Any]
    """Settings of training by flat name."""


def read_toml(path: Path, title: str) -> dict[str, Any]:
    """Read a TOML file, which may begin with a byte order mark.

    Args:
        path: the file.
        title: what messages call it.

    Raises:
        InputError: the file cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"cannot read {title} {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also of numbers and tables without end
        raise InputError(f"{title} {path} is not TOML: {error}") from None


def read_config_file(path: Path) -> ConfigFile:
    """Read a TOML file: ``preset`` and the tables of ``TRAIN_SECTIONS`` and ``[model]``.

    Raises:
        InputError: the file cannot be read, is not TOML, or holds an unknown table or key or a
            value that is not as declared.
    """
    tables = read_toml(path, "config file")
    preset_name = tables.pop("preset", "")
    if not isinstance(preset_name, str):
        raise InputError(f"preset in {path} must be a name; got {preset_name!r}")
    sections: dict[str, type[Section]] = {"model": ModelConfig, **TRAIN_SECTIONS}
    settings: dict[str, dict[str, Any]] = {"model": {}, "train": {}}
    for title, table in tables.items():
        if title not in sections or not isinstance(table, dict):
            hint = did_you_mean(title, sections)
            raise InputError(
                f"config file {path} may hold preset and the tables {', '.join(sections)}; got "
                f"{title!r}{hint}"
            )
        known = sections[title].settings()
        for key, value in table.items():
            if key not in known:
                hint = did_you_mean(key, known)
                raise InputError(f"unknown setting {key!r} in [{title}] of {path}{hint}")
            name = key if title == "model" else known[key].flat_name
            settings["model" if title == "model" else "train"][name] = known[key].check(value)
    return ConfigFile(preset_name, settings["model"], settings["train"])


def config_to_toml(model: ModelConfig, train: TrainConfig, preset_name: str) -> str:
    """Return a whole configuration as TOML text that ``read_config_file`` reads back.

    Args:
        model: the shape of the model.
        train: the settings of training; those that are None are left out.
        preset_name: name of the preset that the shape comes from.
    """
    import tomli_w

    tables = {"preset": preset_name, "model": dataclasses.asdict(model)}
    for name, table in dataclasses.asdict(train).items():
        tables[name] = {key: value for key, value in table.items() if value is not None}
    return tomli_w.dumps(tables)
