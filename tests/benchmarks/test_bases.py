"""The recipe of the pretrained models: texts, copies of the training text, cards."""

import dataclasses
import hashlib
import importlib
import json
import sys
import tomllib
import zipfile
from collections import Counter
from email.parser import Parser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmrec
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import prepare
from mmrec.pretrained import IN_MODELS_PACKAGE, pretrained_models

FOLDER = Path(__file__).parents[2] / "benchmarks" / "bases"


def script(name: str) -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


books, python_code, copies, card = map(script, ("books", "python_code", "copies", "card"))
bases = script("bases")


# ---- books

HEAD = "title: A Book\nauthor: Nobody\n-------\n"
LONG = "The " + "very long paragraph of many words " * 6 + "ends."


def forms(markdown: str) -> set[str]:
    return {books.plain(markdown, f"Author/{n}.md") for n in range(40)}


def test_a_book_loses_its_head_and_its_marks() -> None:
    text = HEAD + "# CHAPTER I\r\n\r\nIt was *very* late, _so_ late\\.  \n\n\n_Nobody_ came.\n"
    assert forms(text) == {"CHAPTER I\n\nIt was very late, so late.\n\nNobody came.\n"}


def test_the_forms_of_books_differ_in_lines_and_quotation_marks() -> None:
    text = HEAD + f"\u201cIt\u2019s late.\u201d\n\n{LONG}\n\nEnd.\n"
    found = forms(text)
    assert {form.split("\n")[0] for form in found} == {
        '"It\'s late."',
        "\u201cIt\u2019s late.\u201d",
    }
    widths = {max(map(len, form.split("\n"))) for form in found}
    assert len(LONG) in widths
    assert all(50 < width < 80 for width in widths - {len(LONG)})
    assert len(widths) > 3
    assert {" ".join(form.split("\n\n")[1].split()) for form in found} == {LONG}


# ---- Python code


def test_which_files_are_taken() -> None:
    source = (FOLDER / "python_code.py").read_text()
    reason = python_code.reason_to_skip
    assert reason("package/module.py", source) == ""
    assert reason("package/tests/module.py", source) == "folder"
    assert reason("pip/_vendor/rich/table.py", source) == "folder"
    assert reason("package/test_module.py", source) == "test"
    assert reason("package/conftest.py", source) == "test"
    assert reason("package/latest.py", source) == ""
    assert reason("package/message_pb2.py", source) == "generated"
    assert reason("package/__init__.py", "from . import module\n") == "short"
    assert reason("package/module.py", source + "#" * 401) == "long lines"
    assert reason("package/module.py", "# Do not edit: generated.\n" + source) == "table"
    values = "".join(f"    {n}: {n * n},\n" for n in range(500))
    assert reason("package/squares.py", f"SQUARES = {{\n{values}}}\n") == "table"


def test_equal_files_are_taken_once_and_a_package_gives_a_limited_size() -> None:
    files = [(f"a/module_{n}.py", f"def function_{n}():\n" + "    pass\n" * 100) for n in range(20)]
    seen: set[bytes] = set()
    skipped: Counter[str] = Counter()
    chosen = python_code.choose_files(iter(files), 5_000, seen, skipped)
    size = len(files[0][1])
    assert 5_000 <= sum(len(text) for _, text in chosen) < 5_000 + size + 2
    assert [name for name, _ in files if name in dict(chosen)] == [name for name, _ in chosen]
    assert skipped == {"beyond the size of a package": 20 - len(chosen)}
    again = [("b" + name[1:], text) for name, text in files]
    skipped.clear()
    assert python_code.choose_files(iter(again), None, seen, skipped) == []
    assert skipped == {"duplicate": 20}


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ("License-Expression: MIT OR Apache-2.0", "MIT OR Apache-2.0"),
        ("License: BSD\nClassifier: License :: OSI Approved :: BSD License", "BSD License"),
        ("License: Apache 2.0 License", "Apache 2.0 License"),
        ("License-Expression: GPL-3.0-or-later", None),
        ("License-Expression: MIT AND LGPL-2.1", None),
        ("License: Do what you want", None),
        ("Name: package", None),
    ],
)
def test_licences(headers: str, expected: str | None) -> None:
    metadata = Parser().parsestr(f"Metadata-Version: 2.1\n{headers}\n")
    if expected is None:
        with pytest.raises(ValueError, match="must be permissive; got"):
            python_code.licence(metadata)
    else:
        assert python_code.licence(metadata) == expected


def test_a_wheel_gives_its_python_files_and_its_licence(tmp_path: Path) -> None:
    wheel = tmp_path / "Some_Package-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("b.py", "# coding: latin-1\nNAME = 'caf\xe9'\r\n".encode("latin-1"))
        archive.writestr("a/c.py", "\ufeffimport b\n")
        archive.writestr("a/data.txt", "no code")
        archive.writestr("Some_Package-1.2.dist-info/METADATA", "License-Expression: MIT\n")
    files = list(python_code.wheel_files(wheel))
    assert files == [("a/c.py", "import b\n"), ("b.py", "# coding: latin-1\nNAME = 'café'\n")]
    assert python_code.read_licence(wheel) == "MIT"
    assert python_code.find_wheel("some-package", "1.2", tmp_path) == wheel
    assert python_code.find_wheel("some-package", "1.3", tmp_path) is None


# ---- copies


def naive(text: bytes, documents: list[bytes]) -> int:
    spans = (text[lo:hi] for lo in range(len(text)) for hi in range(lo + 1, len(text) + 1))
    return max((len(span) for span in spans if any(span in d for d in documents)), default=0)


@given(
    st.lists(st.text("ab c", max_size=25), max_size=4),
    st.lists(st.text("abd ", max_size=60), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_the_longest_copies_are_those_of_a_plain_search(
    texts: list[str], documents: list[str], block: int
) -> None:
    own, other = [t.encode() for t in texts], [d.encode() for d in documents]
    joined = bytes([copies.NO_BYTE]).join(other)
    blocks = [joined[i : i + block] for i in range(0, len(joined), block)]
    found = copies.longest_copies(own, blocks)
    assert [len(span) for span in found] == [naive(text, other) for text in own]
    assert all(span in text for span, text in zip(found, own, strict=True))
    assert all(any(span in document for document in other) for span in found)


def test_copies_of_real_text_are_found_whole(corpus: Corpus) -> None:
    source = corpus.tokenizer.decode(corpus.train.tokens).encode()
    texts = [source[900:1000][::-1] + source[5_000:5_300] + b"\0" * 30, b"\0\1\2", source[70:90]]
    texts.append(b"a snake_case name, then  two spaces")
    blocks = (source[i : i + 1_000] for i in range(0, len(source), 1_000))
    found = copies.longest_copies(texts, blocks)
    assert source[5_000:5_300] in found[0]
    assert found[1:3] == [b"", source[70:90]]
    assert len(found[3]) == naive(texts[3], [source])


# ---- cards


def result(name: str = "english") -> dict[str, Any]:
    group = {"texts": 3, "mean_bytes": 1934, "median": 41, "p90": 57, "lengths": [40, 41, 92]}
    group |= {"title": "written from nothing", "longest": 92, "longest_span": "of the\n`sea`"}
    machine = {"processor": "AMD EPYC", "cores": 1, "memory_bytes": 1, "system": "Linux x86_64"}
    return {
        "machine": {"cpu": "AMD EPYC"},
        "name": name,
        "model": {
            "summary": "English books",
            "preset": "tiny",
            "parameters": 1_954_948,
            "tokenizer": "bpe",
            "vocab_size": 5000,
        },
        "file": {"bytes": 1_959_804, "sha256": "9fea78c4" * 8},
        "text": {
            "title": "Books",
            "description": "Many books.",
            "licence": "public domain",
            "held_out": "Some are held out.",
            "continues": "prose",
            "limits": ["**Facts.** None.", "**Chat.**"],
            "documents": 712,
            "bytes": 314_726_424,
            "tokens": 87_397_634,
            "fingerprint": "0" * 64,
            "packages": [],
        },
        "training": {
            "steps": 6362,
            "tokens": 13_029_376,
            "minutes": 65.0,
            "seed": 0,
            "machine": machine,
            "mmrec_version": "0.7.0",
            "validation": {},
        },
        "bits_per_byte": {"held-out books": {"bytes": 10**6, "float32": 1.5, "int8": 1.5030}},
        "samples": [{"prompt": "It was\n", "seed": 1, "text": "late.\n\n# No heading\n"}],
        "copies": {
            "seed": 0,
            "max_tokens": 500,
            "groups": [group, group | {"title": "held-out text", "longest": 30}],
        },
    }


def test_the_card_says_what_was_measured() -> None:
    page = card.model_card(result())
    lines = page.splitlines()
    assert lines[0] == "# english"
    for row in (
        "| model | mmrec, preset `tiny`, 1,954,948 parameters |",
        "| tokenizer | bpe, 5,000 tokens |",
        "| file | `english.h5`, 1.96 MB: int8 weights, a scale per row |",
        "| held-out books | 1,000,000 | 1.5000 | 1.5030 | +0.20% |",
        "| written from nothing | 3 | 1,934 | 41 | 57 | 92 |",
        "| held-out text | 3 | 1,934 | 41 | 57 | 30 |",
        "- **Facts.** None.",
        "712 documents, 314.7 MB. Some are held out.",
        "    # No heading",  # text of the model is no Markdown
        "    `sea`",
    ):
        assert row in lines
    assert "6,362 steps, 13.0 million tokens: 15% of the text." in page
    assert [line for line in lines if line.startswith("#")][1:] == [
        "## Training text",
        "## Training",
        "## Bits per byte",
        "## Samples",
        "## Copies of the training text",
        "## What it is not for",
    ]
    assert all(len(line) <= 100 for line in lines if not line.startswith("|"))


def test_the_index_keeps_the_entries_of_other_models(tmp_path: Path) -> None:
    path = tmp_path / "index.toml"
    first, second = card.index_entry(result("english")), card.index_entry(result("python"))
    card.write_index(path, "english", first | {"steps": 1})
    card.write_index(path, "python", second)
    card.write_index(path, "english", first)
    found = tomllib.loads(path.read_text())
    assert found == {"english": first, "python": second}
    assert found["python"]["bits_per_byte"] == {"held-out books": 1.503}
    assert found["english"]["sha256"] == "9fea78c4" * 8
    python = result("python")
    python["text"]["corpora"] = ["stdlib"]
    card.write_index(path, "python", card.index_entry(python))
    assert pretrained_models(tmp_path)["python"].read_corpora == ["stdlib"]
    assert pretrained_models(tmp_path)["english"].read_corpora == ()
    json.dumps(found)


# ---- the whole way


def test_excerpts_are_beginnings_of_all_documents(tmp_path: Path) -> None:
    texts = [f"{n} " + "word " * 30_000 for n in range(4)] + ["short"]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = bases.excerpts(path, 10**6)
    assert sorted(found) == sorted(texts)  # 600 kB: all of it
    found = bases.excerpts(path, 120_000)
    assert sum(map(len, found)) <= 120_000
    assert all(any(text.startswith(part) for text in texts) for part in found)
    assert max(map(len, found)) == 40_000
    [whole] = bases.excerpts(write_text(tmp_path / "one.txt", texts[0]), 100_000)
    assert whole == texts[0][:100_000]


def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_every_model_has_a_recipe_and_a_package() -> None:
    """The wheel has those of tiny; the others are in a package of their own."""
    own, apart = pretrained_models(bases.FOLDER), pretrained_models(bases.MODELS_FOLDER)
    assert dict.fromkeys(own, "tiny") | dict.fromkeys(apart, "mini") == {
        name: recipe.preset for name, recipe in bases.RECIPES.items()
    }
    assert tuple(apart) == IN_MODELS_PACKAGE
    for name, model in (own | apart).items():
        assert model.facts["minutes"] == pytest.approx(bases.RECIPES[name].minutes, rel=0.02)
        assert (bases.RECIPES[name].tokenizer, bases.RECIPES[name].summary) == (
            model.tokenizer,
            model.summary,
        )


def test_from_a_run_to_card_and_index(text_file: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "ngram_buckets": 64}
    short: dict[str, Any] = {"batch_size": 2, "seq_len": 32, "eval_every": 4}
    corpus = prepare(str(text_file), "byte", out=tmp_path / "corpus.h5")
    out = tmp_path / "run"
    mmrec.train(corpus, steps=8, out=str(out), progress=False, **sizes, **short)
    recipe = dataclasses.replace(
        bases.RECIPES["english-byte"], prompts=("It was",), sample_tokens=20, copy_tokens=30
    )
    held_out = write_text(tmp_path / "held-out.txt", "".join(text_file.read_text()[:9_000]))
    path = tmp_path / "english-byte.h5"
    texts = {"held-out books": held_out}
    found = bases.measure("english-byte", recipe, out, path, texts, copy_texts=4)
    found = json.loads(json.dumps(found))

    row = found["bits_per_byte"]["held-out books"]
    assert row["float32"] == mmrec.evaluate(out, held_out).bits_per_byte
    assert row["int8"] == mmrec.evaluate(path, held_out).bits_per_byte != row["float32"]
    assert row["bytes"] == held_out.stat().st_size
    groups = found["copies"]["groups"]
    assert [group["texts"] for group in groups] == [4, 4, 4]
    assert groups[2]["longest"] > groups[0]["longest"]  # that text is part of the training text
    assert groups[2]["longest"] == groups[2]["mean_bytes"]
    [sample] = found["samples"]
    assert sample["text"] == mmrec.generate(path, "It was", max_tokens=20, seed=1)
    assert found["training"]["steps"] == mmrec.load(out).step
    assert found["training"]["tokens"] == found["training"]["steps"] * 2 * 32
    assert found["model"]["parameters"] == sum(
        p.numel() for p in mmrec.load(path).model.parameters()
    )

    bases.write_card(found, tmp_path)
    entry = tomllib.loads((tmp_path / "index.toml").read_text())["english-byte"]
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"`{entry['sha256']}`" in (tmp_path / "english-byte.md").read_text()
    assert str(tmp_path).encode() not in path.read_bytes()
    assert bases.may_replace(path, "english-byte")
    assert not bases.may_replace(path, "english")
    path.write_bytes(path.read_bytes() + b"x")
    assert not bases.may_replace(path, "english-byte")
