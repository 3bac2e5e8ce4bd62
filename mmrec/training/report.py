"""A page about a run: its curve, the texts that it wrote, its settings, the machine.

It is made from the files of the run folder, also while the run trains, and of runs of earlier
versions as far as they wrote the same. Nothing here imports torch.
"""

import contextlib
import html
import json
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from mmrec.checkpoint.header import open_checkpoint, read_header, read_tokenizer
from mmrec.checkpoint.manager import list_checkpoints
from mmrec.checkpoint.outputs import RUN_MARK, check_output
from mmrec.config import (
    MODEL_SETTINGS,
    PRESETS,
    TRAIN_SECTIONS,
    TRAIN_SETTINGS,
    VERSION,
    ModelConfig,
    parameter_shapes,
    preset,
    preset_train_settings,
    read_toml,
)
from mmrec.errors import InputError, StorageError
from mmrec.runtime.atomic import atomic_write_text
from mmrec.runtime.pages import figures, page, text
from mmrec.training.metrics import format_duration, format_tokens
from mmrec.training.plots import (
    BEST_COLOUR,
    TRAINING_COLOUR,
    VALIDATION_COLOUR,
    loss_curve_svg,
)
from mmrec.training.status import STATUS_FILE, RunLog, RunStatus, read_json, read_status

READ = ("config.toml", "metrics.jsonl", "samples.jsonl", STATUS_FILE, "summary.json")
"""The files of a run that are read, besides its checkpoints."""
SAMPLE_TYPES = {"step": int, "prompt": str, "text": str}
"""What a line of ``samples.jsonl`` must have to be shown."""
SHOWN_SAMPLES = 8
"""Texts that are shown at once, from the first to the newest; a click shows all others."""


class _Settings(NamedTuple):
    """What ``config.toml`` says."""

    preset: str
    model: dict[str, Any]
    train: dict[str, Any]
    """By flat name."""
    toml: str
    """The file; empty if it cannot be read."""


class _Checkpoint(NamedTuple):
    """What a checkpoint says."""

    metadata: dict[str, Any]
    is_chat: bool
    """Whether the model has a chat template."""


def write_report(run: Path, path: Path, *, force: bool | None = False) -> None:
    """Write the page about a run.

    Args:
        run: the run folder.
        path: the file.
        force: replace a file that is no page of mmrec. None is False where the user has no
            ``--force``.

    Raises:
        InputError: the folder holds no log of a run, or the file must not be replaced; see
            ``check_output``.
        StorageError: the file could not be written.
    """
    inputs = (*(run / name for name in READ), *run.glob("*.h5"))
    check_output(path, "page of a run", inputs=inputs, force=force)
    atomic_write_text(path, render_report(run))


def render_report(run: Path) -> str:
    """Return the page about a run.

    Args:
        run: the run folder.

    Raises:
        InputError: the folder holds no log of a run.
    """
    now, log = read_status(run)
    settings, checkpoint = _read_settings(run), _read_checkpoint(run)
    metadata = checkpoint.metadata if checkpoint else {}
    name = run.resolve().name
    sections = (
        ("", _summary(now, log, settings)),
        ("Loss", _curve(log)),
        ("What it writes", _samples(read_samples(run), log)),
        ("Next", _commands(run, now, checkpoint)),
        ("Validations", _validations(log)),
        ("Data", _data(settings, metadata)),
        ("Machine", _machine(run, metadata)),
        ("Settings", _settings(settings)),
    )
    parts = [f"<h1>{text(name)}</h1><p class=state>{text(now.state_in_words)}</p>"]
    parts += [
        f"<section>{f'<h2>{title}</h2>' * bool(title)}{body}</section>\n"
        for title, body in sections
        if body
    ]
    moment = datetime.now().astimezone().isoformat(" ", "minutes")
    parts.append(f"<footer><small>mmrec report, version {VERSION}, {moment}</small></footer>")
    return page(RUN_MARK, f"{name}, mmrec", "".join(parts), style=STYLE)


# ---- reading


def read_samples(run: Path) -> list[dict[str, Any]]:
    """Read the texts of a run; none if it wrote none."""
    samples = []
    with contextlib.suppress(OSError):
        for line in (run / "samples.jsonl").read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError):  # a run may be writing the last line
                sample = json.loads(line)
                if isinstance(sample, dict) and all(
                    isinstance(sample.get(key), kind) for key, kind in SAMPLE_TYPES.items()
                ):
                    samples.append(sample)
    return samples


def _read_settings(run: Path) -> _Settings:
    """Read ``config.toml`` of any version: settings that are not known now are left out."""
    path = run / "config.toml"
    try:
        tables, toml = read_toml(path, "config file"), path.read_text("utf-8-sig")
    except (InputError, OSError, ValueError):
        return _Settings("", {}, {}, "")
    train = {}
    for title, section in TRAIN_SECTIONS.items():
        table = tables.get(title)
        for key, value in table.items() if isinstance(table, dict) else ():
            if key in section.settings():
                train[section.settings()[key].flat_name] = value
    model = tables.get("model")
    model = {k: v for k, v in model.items() if k in MODEL_SETTINGS} if model else {}
    return _Settings(str(tables.get("preset", "")), model, train, toml)


def _read_checkpoint(run: Path) -> _Checkpoint | None:
    """Read what the newest readable checkpoint says of the run; None without one."""
    for path in (*reversed(list_checkpoints(run)), run / "best.h5"):
        with contextlib.suppress(InputError), open_checkpoint(path) as file:
            return _Checkpoint(read_header(file)[1], bool(read_tokenizer(file).chat_template))
    return None


# ---- the parts of the page


def _summary(now: RunStatus, log: RunLog, settings: _Settings) -> str:
    best = min(log.validations, key=lambda v: float(v["loss"]), default=None)
    summary = read_json(Path(now.run) / "summary.json")
    shown: dict[str, str] = {}
    if best is not None:
        shown["bits per byte, best"] = _number(best.get("bits_per_byte"))
        shown["validation loss, best"] = _number(best["loss"])
        shown["perplexity, best"] = f"{math.exp(min(best['loss'], 700)):,.2f}"
    of = "" if now.total_steps is None else f" of {now.total_steps:,}"
    shown["steps"] = f"{now.step:,}{of}"
    if summary.get("steps") == now.step and isinstance(summary.get("tokens"), int):
        shown["tokens"] = format_tokens(summary["tokens"])
    if now.tokens_per_second is not None:
        shown["tokens per second"] = f"{now.tokens_per_second:,}"
    if now.seconds is not None:
        shown["training time"] = format_duration(now.seconds)
    if now.seconds_left is not None:
        shown["time left"] = format_duration(now.seconds_left)
    with contextlib.suppress(InputError):
        if settings.model:
            shapes = parameter_shapes(ModelConfig.from_dict(settings.model)).values()
            shown["parameters"] = f"{sum(map(math.prod, shapes)) / 1e6:.2f} M"
    reason = summary.get("best_reason")
    note = f"<p>Best model: {text(reason)}</p>" if isinstance(reason, str) and reason else ""
    return figures(shown) + note


def _curve(log: RunLog) -> str:
    train, val = (
        [(step, loss) for step, loss in losses if math.isfinite(loss)] for losses in log.curve
    )
    if not train and not val:
        return "<p>No step was taken yet.</p>"
    try:
        return (
            f"<figure><figcaption>{_legend(val)}</figcaption>{loss_curve_svg(train, val)}</figure>"
        )
    except StorageError as error:
        return f"<p>{text(str(error))}</p>"


def _legend(val: Sequence[tuple[int, float]]) -> str:
    """What the colours of the curve mean."""
    named = [(TRAINING_COLOUR, "training"), (VALIDATION_COLOUR, "validation")]
    if val:
        named.append((BEST_COLOUR, f"best {min(loss for _, loss in val):.4f}"))
    return "".join(f"<i style='background:{colour}'></i>{text(n)} " for colour, n in named)


def _samples(samples: Sequence[dict[str, Any]], log: RunLog) -> str:
    if not samples:
        return "<p>This run wrote no texts.</p>"
    losses = {v["step"]: v["loss"] for v in log.validations}
    articles = [_sample(sample, losses.get(sample["step"])) for sample in samples]
    chosen = _spread(len(articles), SHOWN_SAMPLES)
    seed = samples[-1].get("seed")
    told = f"At each validation the model continued the same text, with seed {text(str(seed))}:"
    prompt = f"<p>{told}</p><pre class=prompt>{html.escape(samples[-1]['prompt'])}</pre>"
    shown = prompt + "".join(articles[i] for i in chosen)
    if len(chosen) == len(articles):
        return shown
    return f"{shown}<details><summary>All {len(articles):,}</summary>{''.join(articles)}</details>"


def _sample(sample: dict[str, Any], loss: float | None) -> str:
    facts = [f"step {sample['step']:,}"]
    if isinstance(tokens := sample.get("tokens"), int):
        facts.append(f"{format_tokens(tokens)} tokens")
    if isinstance(seconds := sample.get("seconds"), int | float):
        facts.append(f"after {format_duration(seconds)}")
    if loss is not None:
        facts.append(f"validation loss {loss:.4f}")
    written = html.escape(sample["text"])
    return f"<article><h3>{text(', '.join(facts))}</h3><pre>{written}</pre></article>\n"


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` places, the first and the last among them, denser at first.

    A model learns most at the beginning, so the places are evenly spaced on a logarithmic scale.
    """
    if count <= most:
        return list(range(count))
    return sorted({round(count ** (i / (most - 1))) - 1 for i in range(most)})


def _commands(run: Path, now: RunStatus, checkpoint: _Checkpoint | None) -> str:
    folder, lines = str(run), list[tuple[str, str]]()
    if checkpoint and checkpoint.is_chat:
        lines.append(("talk with the model", shlex.join(["mmrec", "chat", folder])))
    elif checkpoint:
        command = shlex.join(["mmrec", "generate", folder, "--prompt"])
        lines.append(("write with the model", f'{command} "..."'))
    if now.state == "running":
        lines.append(("watch the run", shlex.join(["mmrec", "status", folder, "--watch"])))
    else:
        resume = ["mmrec", "train", "--resume", folder]
        if now.state in ("signal", "stopped", "killed"):
            lines.append(("continue the run to its end", shlex.join(resume)))
        patience = ["--patience", "0"] if now.state == "early" else []
        lines.append(("train it longer", shlex.join([*resume, "--minutes", "+60", *patience])))
    rows = (f"<dt>{text(what)}</dt><dd><code>{text(line)}</code></dd>" for what, line in lines)
    return f"<dl class=commands>{''.join(rows)}</dl>"


def _validations(log: RunLog) -> str:
    if not log.validations:
        return ""
    rows = (
        (f"{v['step']:,}", _number(v["loss"]), _number(v.get("bits_per_byte")))
        for v in log.validations
    )
    parts = [_table(("step", "loss", "bits per byte"), rows)]
    if log.epochs:
        names = ("mean_loss", "val_loss", "bits_per_byte")
        epochs = (
            (str(e.get("epoch", "")), *(_number(e.get(name)) for name in names)) for e in log.epochs
        )
        header = ("epoch", "training loss, mean", "validation loss", "bits per byte")
        parts.append(f"<h3>On the whole validation text</h3>{_table(header, epochs)}")
    count = len(log.validations)
    return f"<details><summary>{count:,} on the fixed subset</summary>{''.join(parts)}</details>"


def _number(value: Any) -> str:
    """A score with four digits; a dash if it is missing."""
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _data(settings: _Settings, metadata: dict[str, Any]) -> str:
    rows: list[tuple[str, str]] = []
    source = settings.train.get("data") or metadata.get("source")
    if source:
        rows.append(("text", str(source)))
    split = metadata.get("split")
    if isinstance(split, list) and len(split) == 2:
        rows.append(("training tokens", f"{split[0]:,}"))
        rows.append(("validation tokens", f"{split[1]:,}"))
    if "tokenizer" in settings.train:
        size = settings.model.get("vocab_size", "?")
        rows.append(("tokenizer", f"{settings.train['tokenizer']}, {size} tokens"))
    return _table((), rows) if rows else ""


def _machine(run: Path, metadata: dict[str, Any]) -> str:
    status = read_json(run / STATUS_FILE)
    machine, environment = status.get("machine"), metadata.get("environment")
    facts: dict[str, Any] = dict(machine) if isinstance(machine, dict) else {}
    if isinstance(memory := facts.pop("memory_bytes", None), int):
        facts["memory"] = f"{memory / 2**30:.1f} GiB"
    if "mmrec_version" in status:
        facts["mmrec"] = status["mmrec_version"]
    if isinstance(environment, dict):
        instructions = environment.get("processor")
        facts |= {k: v for k, v in environment.items() if k != "processor"}
        if instructions:
            facts["instructions of the processor"] = instructions
    return _table((), ((k.replace("_", " "), str(v)) for k, v in facts.items())) if facts else ""


def _settings(settings: _Settings) -> str:
    if not settings.toml:
        return ""
    rows = list(_changes(settings))
    parts = [f"<p>Preset {text(settings.preset)}.</p>"] if settings.preset else []
    if rows:
        parts.append(_table(("setting", "value", "default"), rows))
    else:
        parts.append("<p>All have their defaults.</p>")
    every = html.escape(settings.toml)
    parts.append(f"<details><summary>All settings</summary><pre>{every}</pre></details>")
    return "".join(parts)


def _changes(settings: _Settings) -> Iterator[tuple[str, str, str]]:
    """Setting, value and default of the settings that differ from their defaults."""
    kind = str(settings.train.get("tokenizer", "bpe"))
    if settings.preset in PRESETS:
        shape = preset(settings.preset, kind)
        for name, value in settings.model.items():
            if name != "vocab_size" and value != getattr(shape, name):
                yield MODEL_SETTINGS[name].flag, str(value), str(getattr(shape, name))
    defaults = {name: s.default for name, s in TRAIN_SETTINGS.items()}
    defaults |= preset_train_settings(settings.preset, kind)
    if settings.preset in PRESETS:
        defaults["vocab"] = PRESETS[settings.preset].vocab_size
    for name, value in settings.train.items():
        if value != defaults[name]:
            default = "" if defaults[name] is None else str(defaults[name])
            yield TRAIN_SETTINGS[name].flag, str(value), default


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class=wide><table>{f'<tr>{head}</tr>' * bool(head)}{body}</table></div>"


STYLE = """
body{max-width:52rem}
h1{margin-bottom:.1rem}
h2{font-size:1.05rem;margin:2rem 0 .6rem;border-top:1px solid var(--rule);padding-top:1.2rem}
h3{font-size:.82rem;font-weight:400;color:var(--dim);margin:1rem 0 .2rem}
.state{color:var(--dim);margin:0 0 1.2rem}
figure{margin:0}
svg{width:100%;height:auto;display:block}
pre,code{font:13px/1.5 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
pre{margin:0;border-left:3px solid var(--rule);padding:.1rem 0 .1rem .8rem}
.prompt{color:var(--dim)}
.commands{display:block}
.commands dd{font-size:1rem;margin:0 0 .7rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:400;color:var(--dim)}
td,th{padding:.15rem 1.2rem .15rem 0;vertical-align:top;white-space:nowrap}
td:nth-child(2){white-space:normal;overflow-wrap:anywhere}
figcaption i{display:inline-block;width:.8rem;height:.8rem;border-radius:50%;margin:0 .3rem 0 .6rem;
vertical-align:-.1rem}
summary{cursor:pointer;color:var(--dim);margin:.8rem 0}
footer{margin-top:2.5rem}
@media(max-width:640px){
body{margin:1rem auto;padding:0 .9rem}
dl{gap:.4rem 1.3rem}
dd{font-size:1.1rem}
svg text{font-size:16px!important}
}
"""
