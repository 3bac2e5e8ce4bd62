"""The model card of a pretrained model and its entry in the index, from what was measured of it."""

import textwrap
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from mmrec.runtime.atomic import atomic_write_text

INDEX_HEAD = "# The pretrained models: benchmarks/bases/bases.py writes this file and the cards.\n"
MAX_SHOWN_CHARS = 400
"""Characters of a copied span that the card shows."""


def index_entry(result: dict[str, Any]) -> dict[str, Any]:
    """Return what the index says of a model.

    Args:
        result: see ``bases.measure``.
    """
    model, text, training = result["model"], result["text"], result["training"]
    keys = ("summary", "parameters", "tokenizer", "vocab_size", "preset")
    entry = {key: model[key] for key in keys} | {"sha256": result["file"]["sha256"]}
    entry |= {"file_bytes": result["file"]["bytes"], "licence": text["licence"]}
    entry |= {"text": text["title"], "text_bytes": text["bytes"]}
    entry |= {"read_corpora": corpora} if (corpora := text.get("corpora")) else {}
    entry |= {key: training[key] for key in ("tokens", "steps", "minutes", "seed")}
    entry |= {"machine": training["machine"]}
    scores = {name: round(score["int8"], 4) for name, score in result["bits_per_byte"].items()}
    return entry | {"bits_per_byte": scores}


def write_index(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Put the entry of a model into the index; those of other models stay.

    Args:
        path: the index, which need not exist.
        name: the model's name.
        entry: see ``index_entry``.
    """
    index = tomllib.loads(path.read_text("utf-8")) if path.exists() else {}
    index[name] = entry
    atomic_write_text(path, INDEX_HEAD + tomli_w.dumps(index))


def indented(text: str) -> str:
    """Return a text as a block of code in Markdown, line for line."""
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def filled(text: str, bullet: str = "") -> str:
    """Return a paragraph in lines of at most 100 characters, behind a bullet if there is one."""
    indent = " " * len(bullet)
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, 100, initial_indent=bullet, subsequent_indent=indent, **options)


def model_card(result: dict[str, Any]) -> str:
    """Return the model card, in Markdown.

    Args:
        result: see ``bases.measure``.
    """
    sections = [*_head(result), *_text(result), *_training(result), *_scores(result)]
    sections += [*_samples(result), *_copies(result), *_limits(result)]
    return "\n\n".join(sections) + "\n"


def _head(result: dict[str, Any]) -> list[str]:
    name, model, file = result["name"], result["model"], result["file"]
    is_bpe = model["tokenizer"] == "bpe"
    rows = {
        "model": f"mmrec, preset `{model['preset']}`, {model['parameters']:,} parameters",
        "tokenizer": model["tokenizer"] + f", {model['vocab_size']:,} tokens" * is_bpe,
        "file": f"`{name}.h5`, {file['bytes'] / 1e6:.2f} MB: int8 weights, a scale per row",
        "SHA-256": f"`{file['sha256']}`",
        "licence": f"weights: that of mmrec; text: {result['text']['licence']}",
    }
    return [
        f"# {name}",
        filled(
            f"A small language model that continues {result['text']['continues']}. It is meant as "
            f"a start: `mmrec finetune {name} --data TEXT` goes on from it with a text of yours. "
            f"`mmrec generate {name}` shows what it has learnt."
        ),
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]),
    ]


def _text(result: dict[str, Any]) -> list[str]:
    text = result["text"]
    size = f"{text['documents']:,} documents, {text['bytes'] / 1e6:.1f} MB. {text['held_out']}"
    rows = [row for row in text["packages"] if row["split"] == "train"]
    names = ", ".join(f"{row['package']} {row['version']}" for row in rows)
    sections = ["## Training text", f"**{text['title']}.** {text['description']}", size]
    return [*map(filled, sections), *[filled(f"Taken from: {names}.")] * bool(rows)]


def _training(result: dict[str, Any]) -> list[str]:
    training, machine = result["training"], result["training"]["machine"]
    share = training["tokens"] / result["text"]["tokens"]
    cores = f"{machine['cores']} core" + "s" * (machine["cores"] != 1)
    return [
        "## Training",
        filled(
            f"{training['steps']:,} steps, {training['tokens'] / 1e6:.1f} million tokens: "
            f"{share:.0%} of the text. {training['minutes']:.0f} minutes on {cores} of "
            f"{machine['processor']}. Seed {training['seed']}, mmrec {training['mmrec_version']}. "
            f"The recipe: `python benchmarks/bases/bases.py {result['name']}`."
        ),
    ]


def _scores(result: dict[str, Any]) -> list[str]:
    rows = [
        f"| {name} | {s['bytes']:,} | {s['float32']:.4f} | {s['int8']:.4f} | "
        f"{s['int8'] / s['float32'] - 1:+.2%} |"
        for name, s in result["bits_per_byte"].items()
    ]
    return [
        "## Bits per byte",
        filled(
            "Of texts that it has not read; lower is better. float32 is the model as it was "
            "trained, int8 the model of the file."
        ),
        "\n".join(["| text | bytes | float32 | int8 | int8 is |", "|---|---|---|---|---|", *rows]),
    ]


def _samples(result: dict[str, Any]) -> list[str]:
    sections = [
        "## Samples",
        "With the default settings; the first text that each prompt and seed gave.",
    ]
    for sample in result["samples"]:
        prompt = sample["prompt"].strip().splitlines()[0]
        sections.append(f"Prompt `{prompt}`, seed {sample['seed']}:")
        sections.append(indented(sample["prompt"] + sample["text"]))
    return sections


def _copies(result: dict[str, Any]) -> list[str]:
    groups = result["copies"]["groups"]
    rows = [
        f"| {group['title']} | {group['texts']} | {group['mean_bytes']:,} | {group['median']} | "
        f"{group['p90']} | {group['longest']} |"
        for group in groups
    ]
    worst = max(groups[:-1], key=lambda group: group["longest"])
    span = worst["longest_span"]
    cut = f", its first {MAX_SHOWN_CHARS} characters" * (len(span) > MAX_SHOWN_CHARS)
    return [
        "## Copies of the training text",
        filled(
            "For each text, the longest passage that stands word for word anywhere in the training "
            "text, in bytes. The last row is text by people, which the model has not read: so much "
            "agrees without any copying."
        ),
        "\n".join(
            [
                "| texts | number | bytes of each | median | 90 % have at most | longest |",
                "|---|---|---|---|---|---|",
                *rows,
            ]
        ),
        f"The longest passage that the model wrote ({worst['title']}){cut}:",
        indented(span[:MAX_SHOWN_CHARS]),
    ]


def _limits(result: dict[str, Any]) -> list[str]:
    bullets = [filled(limit, "- ") for limit in result["text"]["limits"]]
    return ["## What it is not for", "\n".join(bullets)]
