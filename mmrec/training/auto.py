"""``mmrec train auto``: settings from the size of the text and the time, by what was measured.

``choose`` is the rule. docs/development/decisions/038-train-auto.md and 040-pretrained-models.md
have the figures behind it, and say what was not measured. No clock is read, so the same text and
options give the same choice on one machine, however busy it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmrec.config import (
    DEFAULT_EPOCHS,
    LENGTHS,
    MODEL_SETTINGS,
    PRESETS,
    PRETRAINED_SETTINGS,
    DataConfig,
    LengthConfig,
    preset_train_settings,
    seconds_until,
)
from mmrec.data.corpus import Corpus, is_prepared
from mmrec.data.prepare import TextSize, measure_text, read_options, training_texts
from mmrec.data.sources import DOCUMENTS, is_single_pass, parse_mixture
from mmrec.data.tokenizer import KINDS
from mmrec.errors import InputError
from mmrec.runtime.names import user_path
from mmrec.training.pretrained import Candidate, sample_text, score_candidates

DEFAULT_MINUTES = 5.0
"""Time that is assumed if no length is given, about that of a run of default length."""

CORE_SPEED = {("tiny", "char"): 22_000, ("tiny", "bpe"): 14_000, ("mini", "bpe"): 4_200}
"""Training tokens per second of one core with bfloat16 instructions: about three
quarters of what a core of the fastest processor that was measured does beside another one
(decision 047)."""
FLOAT32_SPEED = 0.5
"""Share of it without those instructions (decision 029)."""
MAX_CORES = 4
"""More count as so many: the speed was measured on one core and on two."""

CHAR_BELOW = 1_500_000
"""Characters of training text below which they are the tokens."""
MINI_TOKENS = 6_000_000
"""Tokens that mini must be able to read. On 77 MB of novels it had nearly caught up with tiny
after 3.9 M; half as many again are a margin."""
STRONG_EPOCHS = 16
"""Passes beyond which the stronger regularisation was better (decision 025)."""
LARGE_TABLE = 1 << 25
"""Numbers of a large n-gram embedding: 262,144 rows of tiny, 134 MB."""
LARGE_TABLE_EPOCHS = 1.0
"""Passes up to which a new model gets one: it learns more from a text that it reads once, and
memorises one that it reads again (decision 048)."""
MAX_BITS_PER_BYTE = 3.5
"""Bits per byte before training up to which a pretrained model is begun from. It was better at 2.63
and less, and worse at 4.8 and more, for texts of 100 kB to 10 MB; nothing lay between."""
MIN_NEW_CHARACTERS = 40_000
"""Characters of training text below which it is begun from whatever its bits per byte."""
MAX_PRETRAINED_TOKENS = 20_000_000
"""Tokens that a run reads up to which it is. A new one that had read 14 million was behind."""
PRETRAINED_EPOCHS = 3.0
"""Passes over the text from such a model. More were not better on texts of 20 kB to 100 kB."""


@dataclass(frozen=True)
class Choice:
    """What was chosen. Settings that the user gave are among them, as they were given."""

    preset: str
    """Empty if the run begins from a pretrained model, whose shape it keeps."""
    settings: dict[str, Any]
    """By flat name, of training and of the model."""
    note: str
    """One line: what, and why."""
    candidates: Sequence[Candidate] = ()
    """The pretrained models that were scored on a sample of the text, the best one first."""


def choose(
    text: TextSize,
    given: Mapping[str, Any],
    *,
    cores: int,
    has_bfloat16: bool,
    candidate: Candidate | None = None,
) -> Choice:
    """Choose the settings of a run.

    0. Beginning: the pretrained model that explains the text best, if that is better than a new
       model for this text and time; see ``_begin_from``. Then 1 and 2 are that model's.

    1. Tokens: characters if there are fewer than 1.5 million of them, else BPE with the preset's
       vocabulary.
    2. Preset: mini if it can read 6 million tokens in the time and no text more than four times,
       else tiny. Larger ones were not measured, and are never chosen.
    3. Against memorising: nothing below four passes over the text, dropout 0.1 (0.2 with BPE) up to
       sixteen, then dropout 0.2 with weight decay 1.
    4. N-gram embedding: a large one with BPE, for text that is read once, else the preset's.
    5. Batch and length of the windows: the preset's.

    Several models and a student that learns their mean (``teachers``) would come after 3, for more
    than sixteen passes; they are not chosen.

    Args:
        text: size of the training text.
        given: settings that the user gave, which win.
        cores: threads of all processes.
        has_bfloat16: whether matrix products run in bfloat16.
        candidate: the pretrained model that explains a sample of the text best.

    Raises:
        InputError: the text does not fill one batch.
    """
    if candidate is not None:
        chosen = _begin_from(candidate, text, given, cores=cores, has_bfloat16=has_bfloat16)
        if chosen is not None:
            return chosen
    kind = text.tokenizer or given.get("tokenizer") or ("bpe" if given.get("vocab") else "")
    kind = kind or ("char" if text.characters < CHAR_BELOW else "bpe")
    tokens, passes = text.tokens(kind), {}
    for preset in ("tiny", "mini"):
        speed = _speed(preset, kind, cores, has_bfloat16)
        sizes = {"batch_size": 16, "seq_len": 256} | preset_train_settings(preset, kind)
        sizes |= {name: given[name] for name in sizes if name in given}
        passes[preset] = _tokens_read(given, speed, sizes, tokens) / max(1, tokens)
    has_time = passes["mini"] * tokens >= MINI_TOKENS
    is_mini = kind == "bpe" and has_time and passes["mini"] <= DEFAULT_EPOCHS
    preset = "mini" if is_mini else "tiny"
    epochs = passes[preset]

    settings: dict[str, Any] = {"tokenizer": kind}
    if not _has_length(given):
        settings["minutes"] = DEFAULT_MINUTES
    if given.get("teachers"):  # a student does not memorise
        settings["dropout"] = 0.0
    else:
        settings |= _regularisation(epochs, kind)
    table = ""
    if kind == "bpe" and epochs <= LARGE_TABLE_EPOCHS and "ngram_buckets" not in given:
        width = given.get("width") or PRESETS[preset].width
        settings["ngram_buckets"] = LARGE_TABLE // width
        table = f"{settings['ngram_buckets']:,} rows of n-grams, "
    settings |= {"batch_size": 16} | preset_train_settings(preset, kind) | dict(given)
    sizes = {"batch_size": 16, "seq_len": 256} | settings
    _check_size(text, kind, sizes["batch_size"], sizes["seq_len"])
    length = LengthConfig(**{n: settings[n] for n in LENGTHS if settings.get(n) is not None})
    note = (
        f"auto    {preset}, {_describe_tokenizer(text, kind, preset, settings)}, {table}"
        f"dropout {settings['dropout']:g}{_describe_decay(settings)}, "
        f"batch {sizes['batch_size']} x {sizes['seq_len']}: "
        f"{_describe_reading(text, epochs, length, given)}"
    )
    return Choice(preset, settings, note)


def _regularisation(epochs: float, kind: str) -> dict[str, float]:
    """Settings against memorising, by the passes over the text and the kind of its tokens."""
    if epochs < DEFAULT_EPOCHS:
        return {"dropout": 0.0}
    if epochs <= STRONG_EPOCHS:
        return {"dropout": 0.2 if kind == "bpe" else 0.1}
    return {"dropout": 0.2, "weight_decay": 1.0}


def _speed(preset: str, kind: str, cores: int, has_bfloat16: bool) -> float:
    """Assumed training tokens per second."""
    core_speed = CORE_SPEED.get((preset, "bpe" if kind == "bpe" else "char"), 0)
    return core_speed * min(cores, MAX_CORES) * (1.0 if has_bfloat16 else FLOAT32_SPEED)


def _begin_from(
    candidate: Candidate,
    text: TextSize,
    given: Mapping[str, Any],
    *,
    cores: int,
    has_bfloat16: bool,
) -> Choice | None:
    """The choice that begins from a pretrained model; None if a new model is better."""
    model, bits = candidate.model, candidate.bits_per_byte
    if bits > MAX_BITS_PER_BYTE and text.characters >= MIN_NEW_CHARACTERS:
        return None
    kind = model.tokenizer
    tokens = text.tokens(kind)
    sizes = {"batch_size": 16, "seq_len": 256} | preset_train_settings(model.preset, kind)
    sizes |= {name: given[name] for name in sizes if name in given}
    speed = _speed(model.preset, kind, cores, has_bfloat16)
    epochs = _tokens_read(given, speed, sizes, tokens) / max(1, tokens)
    # by far, as the speed is assumed
    is_short = epochs > 2 * PRETRAINED_EPOCHS and not (given.get("epochs") or given.get("steps"))
    if is_short:
        epochs = PRETRAINED_EPOCHS
    if epochs * tokens > MAX_PRETRAINED_TOKENS:
        return None
    settings: dict[str, Any] = {"initialize_from": model.name, "dropout": 0.0}
    settings |= PRETRAINED_SETTINGS | sizes | dict(given)
    if is_short:
        settings = {k: v for k, v in settings.items() if k not in LENGTHS} | {"epochs": epochs}
    elif not _has_length(given):
        settings["minutes"] = DEFAULT_MINUTES
    _check_size(text, kind, sizes["batch_size"], sizes["seq_len"])
    length = LengthConfig(**{n: settings[n] for n in LENGTHS if settings.get(n) is not None})
    reading = f"{_size(text.bytes)} of training text will be read {epochs:g} times, as more passes "
    reading += "were not better"
    note = (
        f"auto    from the pretrained model {model.name} ({bits:.2f} bits per byte of a sample "
        f"before training; --from-scratch begins anew), dropout {settings['dropout']:g}, "
        f"batch {sizes['batch_size']} x {sizes['seq_len']}: "
        f"{reading if is_short else _describe_reading(text, epochs, length, given)}"
    )
    return Choice("", settings, note)


def _tokens_read(
    given: Mapping[str, Any], speed: float, sizes: Mapping[str, int], tokens: int
) -> float:
    """Tokens that a run reads at an assumed ``speed`` (tokens per second), or by its length."""
    if given.get("epochs") is not None:
        return float(given["epochs"]) * tokens
    if given.get("steps") is not None:
        batches = int(given["steps"]) * int(given.get("gradient_accumulation_steps", 1))
        return batches * sizes["batch_size"] * sizes["seq_len"]
    if given.get("until") is not None:
        return max(0.0, seconds_until(LengthConfig(until=given["until"]).until or "")) * speed
    return 60 * float(given.get("minutes") or DEFAULT_MINUTES) * speed


def _check_size(text: TextSize, kind: str, batch_size: int, seq_len: int) -> None:
    """Check that a text fills one batch, and its validation text one window.

    Raises:
        InputError: it does not.
    """
    unit = {"char": "characters", "byte": "bytes", "bpe": "tokens"}[kind]
    for name, count, needed in (
        ("training", text.tokens(kind), batch_size * seq_len + 1),
        ("validation", text.val_tokens(kind), seq_len + 1),
    ):
        if count < needed:
            raise InputError(
                f"auto needs {needed:,} {unit} of {name} text, one {'batch' * (name == 'training')}"
                f"{'window' * (name != 'training')} of its smallest preset; {text.source} has "
                f"{count:,}: use more text, or name a preset with a smaller --batch-size and "
                "--seq-len"
            )


def _describe_tokenizer(text: TextSize, kind: str, preset: str, settings: Mapping[str, Any]) -> str:
    if kind != "bpe":
        return f"by {'character' if kind == 'char' else 'byte'}"
    if text.tokenizer:
        return "the vocabulary of its corpus"
    return f"vocabulary {settings.get('vocab') or PRESETS[preset].vocab_size:,}"


def _describe_decay(settings: Mapping[str, Any]) -> str:
    decay = settings.get("weight_decay")
    return "" if decay is None else f", weight decay {decay:g}"


def _describe_reading(
    text: TextSize, epochs: float, length: LengthConfig, given: Mapping[str, Any]
) -> str:
    times = f"{epochs:.1f}" if epochs < 9.95 else f"{epochs:,.0f}"
    return (
        f"{_size(text.bytes)} of training text will be read about {times} times "
        f"{_describe_time(length, given)}"
    )


def _describe_time(length: LengthConfig, given: Mapping[str, Any]) -> str:
    if length.minutes is None:
        return length.describe() if length.until else f"in {length.describe()}"
    words = f"in {length.minutes:.6g} minute{'s' * (length.minutes != 1)}"
    return words if _has_length(given) else f"{words}, the default of auto"


def _has_length(given: Mapping[str, Any]) -> bool:
    return any(given.get(name) is not None for name in LENGTHS)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 950_000 else f"{count / 1e3:.0f} kB"


def choose_for(
    data: DataConfig,
    given: Mapping[str, Any],
    *,
    documents: Sequence[str] | None = None,
    precision: str = "auto",
    processes: int = 1,
) -> Choice:
    """Measure a text, and choose the settings of a run on it on this machine; see ``choose``.

    Args:
        data: the settings of the text.
        given: settings that the user gave, by flat name.
        documents: the documents, if they do not come from ``data``.
        precision: the setting.
        processes: processes that train together.

    Raises:
        InputError: the text cannot be read, can be read only once, or is too small.
    """
    import torch

    from mmrec.runtime.hardware import bfloat16_instructions, resolve_precision

    resolved, _ = resolve_precision(precision, bfloat16_instructions())
    sample: list[str] = []
    if data.source == DOCUMENTS:
        assert documents is not None
        text = measure_text(documents, read_options(data))
        sample = sample_text(documents)
    elif is_prepared(data.source):
        text = TextSize.of_corpus(Corpus.open(user_path(data.source)))
    else:
        for _, name in parse_mixture(data.source):
            if is_single_pass(name):
                raise InputError(
                    f"auto reads the text to measure it, and {name} can be read only once: save it "
                    "in a file, or name a preset"
                )
        text = measure_text(data.source, read_options(data))
        if len(parse_mixture(data.source)) == 1:
            sample = sample_text(training_texts(data.source, read_options(data)))
    candidates = []
    if sample and _may_begin_from_pretrained(given):
        kinds = [given["tokenizer"]] if given.get("tokenizer") else KINDS
        candidates = score_candidates(sample, kinds, data.source)
    choice = choose(
        text,
        given,
        cores=torch.get_num_threads() * processes,
        has_bfloat16=resolved == "bfloat16",
        candidate=candidates[0] if candidates else None,
    )
    return replace(choice, candidates=candidates)


def _may_begin_from_pretrained(given: Mapping[str, Any]) -> bool:
    """Whether nothing was given that a pretrained model would not have."""
    shape = MODEL_SETTINGS.keys() - {"dropout"}
    return not any(given.get(name) for name in ("from_scratch", "vocab", "teachers", *shape))
