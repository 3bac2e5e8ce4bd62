"""The pretrained models: from their texts to the files in mmrec/pretrained and in mmrec-models.

    python benchmarks/bases/bases.py                    # all of RECIPES
    python benchmarks/bases/bases.py english --texts CORPORA
    python benchmarks/bases/bases.py english --run RUN  # of a run that is trained

For each model: write its text, prepare it, train, write the compact checkpoint, measure it, and
write its card and its entry in the index. A text that is there is not made again, and a training
that was stopped goes on where it stopped: run the same command again. Training takes an hour per
model and its text a gigabyte of disk.

CORPORA is a folder with texts of other kinds to measure the model on; see OTHER_TEXTS. What is
measured goes into results/pretrained-NAME.json, from which card and index are written; with
``--cards`` only that is done.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from books import URL, write_books
from card import index_entry, model_card, write_index
from copies import NO_BYTE, longest_copies
from python_code import MAX_PACKAGE_BYTES, write_code
from text_files import read_documents

import mmrec
from mmrec.checkpoint.checkpoint import LoadedModel, load_model, save_compact
from mmrec.checkpoint.manager import list_checkpoints
from mmrec.checkpoint.outputs import check_output
from mmrec.data.corpus import Corpus
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.evaluation.provenance import training_corpus
from mmrec.model import parameter_counts
from mmrec.pretrained import IN_MODELS_PACKAGE
from mmrec.profiling.kernel_bench import describe_machine
from mmrec.runtime.atomic import atomic_write_text

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "mmrec" / "pretrained"
MODELS_FOLDER = Path(__file__).parent / "mmrec-models" / "mmrec_models"
"""Of the package that has the models which are too large for mmrec's own."""


@dataclass(frozen=True)
class Text:
    """What the card says of a training text, in Markdown."""

    title: str
    description: str
    licence: str
    held_out: str
    continues: str
    """What its models continue."""
    limits: tuple[str, ...]
    """What its models are not for."""
    corpora: tuple[str, ...] = ()
    """Those of mmrec's own corpora that it holds."""


TEXTS = {
    "books": Text(
        title="English books in the public domain",
        description="Novels, stories, essays, plays and poems in English, most of them written "
        "between 1800 and 1930, many of them translations, from the collection "
        "mlschmitt/classic-books-markdown on GitHub. Shakespeare and the Bible are left out. A "
        "third of the books is wrapped to lines, and half of them has straight quotation marks, so "
        "that the model knows the forms that such texts come in.",
        licence="public domain in the United States",
        held_out="The books of Willa Cather, Lucy Maud Montgomery, Joseph Conrad and P.G. "
        "Wodehouse are held out: the model has not read them.",
        continues="English prose in the manner of novels of the nineteenth and early twentieth "
        "centuries",
        limits=(
            "**Facts and advice.** It continues a text in its style. What it says is true only by "
            "chance.",
            "**Chat.** It answers no questions and follows no instructions, unless it is "
            "fine-tuned for that.",
            "**Anything after 1930.** Its books are older: so are their words, their spelling and "
            "their world.",
            "**Readers who could be hurt.** The books have the prejudices of their time, for "
            "instance about peoples, women and faiths, and the model writes them on.",
            "**Other languages.** It has read English.",
        ),
    ),
    "code": Text(
        title="Python code under permissive licences",
        description="The standard library of Python and files of packages from PyPI, without "
        "tests, generated files, tables and copies of other packages. A package gives "
        f"{MAX_PACKAGE_BYTES / 1e6:g} MB at most, so that no style dominates.",
        licence="BSD, MIT, Apache-2.0, PSF-2.0 and other permissive licences",
        held_out="The packages networkx, rich, flask and werkzeug are held out: the model has not "
        "read them.",
        continues="Python source code",
        limits=(
            "**Programs.** It writes what looks like Python. The code is not correct: names are "
            "not defined, arguments are invented, and brackets may stay open.",
            "**Answers and instructions.** It continues a file. It follows no comment that asks "
            "for something.",
            "**Code that must be safe.** Nobody has thought about what it writes. Short passages "
            "can be copies of code that has a licence; see above.",
            "**A measure on `stdlib`.** It has read the standard library, so mmrec's corpus "
            "`stdlib` does not measure it.",
            "**Prose, and other programming languages.**",
        ),
        corpora=("stdlib",),
    ),
}


@dataclass(frozen=True)
class Recipe:
    """How a model is made."""

    summary: str
    """What it has read, in a few words."""
    text: str
    """A key of TEXTS."""
    tokenizer: str
    vocab: int | None
    minutes: int
    prompts: tuple[str, ...]
    """Of the samples in the card."""
    sample_tokens: int
    """Tokens of a sample."""
    copy_tokens: int
    """Tokens of each text in which copies are looked for: about 2,000 bytes."""
    preset: str = "tiny"
    seed: int = 0


PROSE = ("It was late in the evening when", '"My dear sir," said', "The old house stood")
CODE = ("def read_lines(path):\n", "class Stack:\n", "import argparse\n")
RECIPES = {
    "english": Recipe("English books", "books", "bpe", 5000, 50, PROSE, 120, 500),
    "english-byte": Recipe("English books", "books", "byte", None, 65, PROSE, 500, 2000),
    "english-mini": Recipe("English books", "books", "bpe", 8192, 50, PROSE, 120, 500, "mini"),
    "python": Recipe("Python code", "code", "bpe", 5000, 65, CODE, 150, 600),
}
TRAIN_OPTIONS = ["--schedule", "wsd", "--dropout", "0", "--eval-every", "500"]
TRAIN_OPTIONS += ["--save-every", "1000"]
VAL_FRACTION = 0.02

OTHER_TEXTS = {
    "plays in verse (tinyshakespeare)": "tinyshakespeare/input.txt",
    "stories for children (TinyStories)": "tinystories_sample/stories.txt",
    "web pages (C4)": "c4_sample/c4_sample.jsonl",
}
"""Texts in the folder ``--texts``, by what the card calls them."""
HELD_OUT_TEXTS = {"held-out books": "books", "held-out Python packages": "code"}
MEASURED_BYTES = 250_000
"""Of each text, about so much is scored."""
DOCUMENT_CHARS = 40_000
"""Of each document the beginning is scored, so that a text is not measured by a few of them."""
COPY_TEXTS = 200
PROMPT_BYTES = 200
"""Of the training text, before the texts that continue it."""
CONTINUING = f"continuing {PROMPT_BYTES} bytes of the training text"
COPY_SEED = 0


def command(*words: str) -> None:
    """Run a command of mmrec, which shows its progress; end if it fails."""
    code = subprocess.run([sys.executable, "-m", "mmrec", *words]).returncode
    if code:
        raise SystemExit(code)


# ---- making


def make_text(kind: str, work: Path, clone: Path | None) -> Path:
    """Write the text of a kind unless it is there; return its folder."""
    folder = work / kind
    if not (folder / "held-out.jsonl").exists():
        if kind == "code":
            write_code(folder)
        else:
            if clone is None and not (clone := work / "classic-books-markdown").exists():
                subprocess.run(["git", "clone", "--bare", URL, str(clone)], check=True)
            assert clone is not None
            write_books(clone, folder)
    return folder


def train(name: str, recipe: Recipe, work: Path, clone: Path | None) -> Path:
    """Train a model, or go on with it; return its run folder when it is finished."""
    run, corpus = work / name, work / f"{name}.h5"
    if is_finished(run):
        return run
    if run.is_dir() and list_checkpoints(run):
        command("train", "--resume", str(run))
    else:
        text = make_text(recipe.text, work, clone) / "train.jsonl"
        vocab = [] if recipe.vocab is None else ["--vocab", str(recipe.vocab)]
        tokenizer = ["--tokenizer", recipe.tokenizer, *vocab]
        options = ["--val-fraction", str(VAL_FRACTION), "--out", str(corpus)]
        command("data", "prepare", str(text), *tokenizer, *options)
        length = ["--minutes", str(recipe.minutes), "--seed", str(recipe.seed)]
        paths = ["--data", str(corpus), "--out", str(run)]
        force = ["--force"] * run.is_dir()  # a run that was stopped before its first checkpoint
        command("train", recipe.preset, *paths, *length, *TRAIN_OPTIONS, *force)
    if not is_finished(run):
        raise SystemExit(f"{name} is not finished: run the same command again to go on")
    return run


def is_finished(run: Path) -> bool:
    """Whether a run took all of its steps."""
    path = run / "summary.json"
    return path.exists() and json.loads(path.read_text("utf-8"))["ended"] == "done"


def compact_metadata(loaded: LoadedModel, name: str, summary: str) -> dict[str, Any]:
    """Return what a compact checkpoint says of itself: as the run, without paths of its machine.

    Raises:
        ValueError: a path is left.
    """
    metadata: dict[str, Any] = json.loads(json.dumps(loaded.metadata))
    metadata["source"] = metadata["train"]["data"]["source"] = summary
    metadata["train"].get("output", {}).pop("out", None)
    metadata["pretrained"] = name
    pending: list[Any] = [metadata]
    while pending:
        value = pending.pop()
        if isinstance(value, str) and Path(value).is_absolute():
            raise ValueError(f"metadata must have no path; got {value}")
        if isinstance(value, dict | list):
            pending += value.values() if isinstance(value, dict) else value
    return metadata


# ---- measuring


def excerpts(path: Path, max_bytes: int = MEASURED_BYTES) -> list[str]:
    """Return beginnings of the documents of a text, in an order that its hashes draw.

    Args:
        path: the text.
        max_bytes: where to end. If there are few documents, longer beginnings reach it.
    """
    documents = list(read_documents(path))
    chars = max(DOCUMENT_CHARS, max_bytes // max(1, len(documents)))
    documents.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    chosen, size = list[str](), 0
    for text in documents:
        if size < max_bytes:
            chosen.append(text[: min(chars, max_bytes - size)])
            size += len(chosen[-1].encode())
    return chosen


def score(models: dict[str, LoadedModel], texts: dict[str, Path]) -> dict[str, Any]:
    """Return bits per byte of each text under each model, by their names."""
    scores: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, path in texts.items():
            sample = Path(folder, "sample.jsonl")
            lines = [json.dumps({"text": text}) + "\n" for text in excerpts(path)]
            sample.write_text("".join(lines), "utf-8")
            row: dict[str, float] = {}
            for name, model in models.items():
                evaluation = mmrec.evaluate(model, sample)
                row["bytes"] = evaluation.bytes
                row[name] = evaluation.bits_per_byte
            scores[title] = row
            print(f"{title}: {json.dumps(row)}", flush=True)
    return scores


def token_text(tokens: np.ndarray, tokenizer: Tokenizer) -> bytes:
    """Return the bytes of token ids (n,); NO_BYTE stands for the end token."""
    table = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    table[tokenizer.eot] = bytes([NO_BYTE])
    sizes = np.array([len(entry) for entry in table])
    begins = np.cumsum(sizes) - sizes  # of each token among the bytes of the table
    counts = sizes[tokens]
    ends = np.cumsum(counts)
    places = np.arange(counts.sum()) - np.repeat(ends - counts - begins[tokens], counts)
    return np.frombuffer(b"".join(table), np.uint8)[places].tobytes()


def training_blocks(corpus: Corpus, block_tokens: int = 1 << 22) -> Iterator[bytes]:
    """Yield the training text of a corpus in blocks; NO_BYTE stands between documents."""
    for begin in range(0, corpus.train.n_tokens, block_tokens):
        tokens = np.asarray(corpus.train.tokens[begin : begin + block_tokens])
        yield token_text(tokens, corpus.tokenizer)


def summarise_copies(title: str, texts: Sequence[bytes], spans: Sequence[bytes]) -> dict[str, Any]:
    """Return the distribution of the lengths of copied spans, in bytes."""
    sizes = np.array([len(span) for span in spans])
    return {
        "title": title,
        "texts": len(texts),
        "mean_bytes": round(float(np.mean([len(text) for text in texts]))),
        "median": round(float(np.median(sizes))),
        "p90": int(np.quantile(sizes, 0.9, method="higher")),
        "longest": int(sizes.max()),
        "longest_span": max(spans, key=len).decode("utf-8", "replace"),
        "lengths": sorted(sizes.tolist()),
    }


def measure_copies(
    model: LoadedModel, corpus: Corpus, held_out: Path, max_tokens: int, count: int
) -> dict[str, Any]:
    """Look for copies of the training text in texts that the model writes.

    Args:
        model: writes at temperature 0.8, with top_p 0.95.
        corpus: what it was trained on.
        held_out: text that it was not trained on, in which copies are looked for, too.
        max_tokens: tokens of each text.
        count: how many texts of each kind.
    """
    settings: dict[str, Any] = {"max_tokens": max_tokens, "seed": COPY_SEED, "temperature": 0.8}
    draw, prompts = np.random.default_rng(COPY_SEED), list[str]()
    for begin in draw.integers(0, max(1, corpus.train.n_tokens - PROMPT_BYTES), count).tolist():
        tokens = np.asarray(corpus.train.tokens[begin : begin + PROMPT_BYTES])
        text = token_text(tokens, corpus.tokenizer).split(bytes([NO_BYTE]))[-1]
        prompts.append(text[:PROMPT_BYTES].decode("utf-8", "ignore"))
    encoded = {}
    for title, group in (("written from nothing", [""] * count), (CONTINUING, prompts)):
        encoded[title] = [text.encode() for text in model.generate(group, **settings)]
    size = int(np.mean([len(text) for group in encoded.values() for text in group]))
    other = b"".join(text.encode() + bytes([NO_BYTE]) for text in excerpts(held_out))
    begins = draw.integers(0, max(1, len(other) - size), count).tolist()
    encoded["held-out text"] = [other[b : b + size].replace(b"\xff", b"") for b in begins]
    groups, blocks = [], list(training_blocks(corpus))
    for title, group in encoded.items():
        spans = longest_copies(group, blocks)
        row = summarise_copies(title, group, spans)
        groups.append(row)
        print(f"{title}: longest copy {row['longest']}, median {row['median']}", flush=True)
    return {"seed": COPY_SEED, "max_tokens": max_tokens, "groups": groups}


def training_facts(run: Path, loaded: LoadedModel, seed: int) -> dict[str, Any]:
    """Return what the training took, up to the checkpoint that was chosen."""
    summary = json.loads((run / "summary.json").read_text("utf-8")) if is_finished(run) else {}
    status = json.loads((run / "status.json").read_text("utf-8"))
    config = loaded.metadata["train"]
    return {
        "steps": loaded.step,
        "tokens": loaded.step * config["data"]["batch_size"] * config["data"]["seq_len"],
        "minutes": round(summary.get("seconds", status["seconds"]) / 60, 1),
        "seed": seed,
        "machine": status["machine"],
        "mmrec_version": status["mmrec_version"],
        "validation": loaded.metadata["val"],
    }


def write_samples(model: LoadedModel, recipe: Recipe) -> list[dict[str, Any]]:
    """Return a text that continues each prompt, with the default settings and one seed each."""
    settings = {"max_tokens": recipe.sample_tokens}
    return [
        {"prompt": prompt, "seed": seed, "text": model.generate(prompt, seed=seed, **settings)}
        for seed, prompt in enumerate(recipe.prompts, 1)
    ]


def measure(
    name: str,
    recipe: Recipe,
    run: Path,
    path: Path,
    texts: dict[str, Path],
    copy_texts: int = COPY_TEXTS,
) -> dict[str, Any]:
    """Write the compact checkpoint of a run, and return all that card and index say of it.

    Args:
        name: of the model.
        recipe: of the model.
        run: its run folder.
        path: the compact checkpoint.
        texts: what it is scored on, by what the card calls them. The held-out text of its own kind
            is among them.
        copy_texts: how many texts of each kind are searched for copies.
    """
    text = TEXTS[recipe.text]
    loaded = mmrec.load(run)
    save_compact(path, loaded, compact_metadata(loaded, name, recipe.summary))
    compact, corpus = load_model(path), training_corpus(loaded)
    own = next(title for title, kind in HELD_OUT_TEXTS.items() if kind == recipe.text)
    return {
        "machine": describe_machine(),
        "name": name,
        "model": {
            "summary": recipe.summary,
            "preset": recipe.preset,
            "parameters": parameter_counts(loaded.model.config)["total"],
            "tokenizer": loaded.tokenizer.kind,
            "vocab_size": loaded.tokenizer.vocab_size,
        },
        "file": {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        },
        "text": {
            **asdict(text),
            "documents": len(corpus.train.doc_bytes),
            "bytes": corpus.train.n_bytes,
            "tokens": corpus.train.n_tokens,
            "fingerprint": corpus.info["fingerprint"],
            "packages": packages(texts[own].with_name("packages.json")),
        },
        "training": training_facts(run, loaded, recipe.seed),
        "bits_per_byte": score({"float32": loaded, "int8": compact}, texts),
        "samples": write_samples(compact, recipe),
        "copies": measure_copies(compact, corpus, texts[own], recipe.copy_tokens, copy_texts),
    }


def packages(record: Path) -> list[dict[str, str]]:
    """Return package, version, licence and split of the packages of a text; none of another."""
    if not record.exists():
        return []
    keys = ("package", "version", "licence", "split")
    rows = json.loads(record.read_text("utf-8"))
    return [{key: row[key] for key in keys} for row in rows]


def texts_to_measure(work: Path, corpora: Path | None) -> dict[str, Path]:
    """Return the texts that models are scored on, by what the card calls them.

    Raises:
        InputError: a text is missing.
    """
    texts = {title: work / kind / "held-out.jsonl" for title, kind in HELD_OUT_TEXTS.items()}
    if corpora is not None:
        texts |= {title: corpora / path for title, path in OTHER_TEXTS.items()}
    for title, path in texts.items():
        if not path.is_file():
            raise InputError(f"the {title} must be at {path}; there is no such file")
    return texts


def may_replace(path: Path, name: str) -> bool:
    """Whether a checkpoint is the one that the index beside it has under this name."""
    index = path.with_name("index.toml")
    if not (path.exists() and index.exists()):
        return False
    entry = tomllib.loads(index.read_text("utf-8")).get(name, {})
    return entry.get("sha256") == hashlib.sha256(path.read_bytes()).hexdigest()


def write_card(result: dict[str, Any], folder: Path) -> None:
    """Write card and index entry of a model into the folder of its checkpoint."""
    atomic_write_text(folder / f"{result['name']}.md", model_card(result))
    write_index(folder / "index.toml", result["name"], index_entry(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--run", type=Path, help="run folder of a model that is trained")
    parser.add_argument("--work", type=Path, help="folder of texts and runs (runs/pretrained)")
    parser.add_argument("--texts", type=Path, help="folder of other texts to measure on")
    parser.add_argument("--books", type=Path, help="a clone of the books, else git makes one")
    parser.add_argument("--cards", action="store_true", help="cards and index entries only")
    parser.add_argument("--out", type=Path, help="folder of the models (those of the packages)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--force", action="store_true", help="overwrite files of others")
    options = parser.parse_args()
    names = options.names or list(RECIPES)
    if unknown := [name for name in names if name not in RECIPES]:
        parser.error(f"NAME must be one of {', '.join(RECIPES)}; got {unknown[0]}")
    if options.run is not None and len(names) != 1:
        parser.error(f"--run needs one NAME; got {len(names)}")
    work = options.work or (options.run.parent if options.run else Path("runs", "pretrained"))
    try:
        for name in names:
            result_path = options.results / f"pretrained-{name}.json"
            out = options.out or (MODELS_FOLDER if name in IN_MODELS_PACKAGE else FOLDER)
            if not options.cards:
                path = out / f"{name}.h5"
                force = options.force or may_replace(path, name)
                check_output(path, "checkpoint", force=force)
                check_output(
                    result_path, "benchmark result", option="--results", force=options.force
                )
                run = options.run or train(name, RECIPES[name], work, options.books)
                for kind in TEXTS if options.run is None else ():
                    make_text(kind, work, options.books)
                result = measure(
                    name, RECIPES[name], run, path, texts_to_measure(work, options.texts)
                )
                atomic_write_text(result_path, json.dumps(result, indent=1) + "\n")
            write_card(json.loads(result_path.read_text("utf-8")), out)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
