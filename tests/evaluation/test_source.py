"""Evaluating a loaded model on a source, and which text a checkpoint may have read."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmrec.checkpoint.checkpoint import LoadedModel
from mmrec.config import TrainConfig, config_to_toml
from mmrec.data.corpus import Corpus
from mmrec.errors import InputError
from mmrec.evaluation.evaluate import evaluate_split
from mmrec.evaluation.provenance import training_corpus
from mmrec.evaluation.source import evaluate_source, training_text
from mmrec.model import Model
from tests.conftest import SMALL


@pytest.fixture
def loaded(corpus: Corpus, text_file: Path, tmp_path: Path) -> LoadedModel:
    """A model that says it was trained on the text file, in a folder without config.toml."""
    train = TrainConfig.from_flat({"data": str(text_file), "tokenizer": "byte"})
    metadata = {"train": dataclasses.asdict(train), "fingerprint": corpus.info["fingerprint"]}
    model = Model(SMALL).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.05
    return LoadedModel(tmp_path / "best.h5", model, corpus.tokenizer, 0, metadata)


def write_config(loaded: LoadedModel, source: str) -> None:
    train = TrainConfig.from_flat({"data": source, "tokenizer": "byte"})
    text = config_to_toml(loaded.model.config, train, "tiny")
    loaded.path.with_name("config.toml").write_text(text)


def test_a_text_is_read_only_if_the_run_folder_names_it(
    loaded: LoadedModel, corpus: Corpus, text_file: Path
) -> None:
    with pytest.raises(InputError, match="names it too: give --other"):
        training_corpus(loaded, option="--other")
    write_config(loaded, "another.txt")
    with pytest.raises(InputError, match=r"another.txt.* moved, tell its run .* --data NEW"):
        evaluate_source(loaded)
    write_config(loaded, str(text_file))
    assert training_corpus(loaded).info["fingerprint"] == corpus.info["fingerprint"]
    assert training_text(loaded).startswith(
        corpus.tokenizer.decode(corpus.train.tokens[:50]).encode()
    )


def test_a_text_that_changed_is_not_that_of_training(loaded: LoadedModel, text_file: Path) -> None:
    write_config(loaded, str(text_file))
    changed = replace(loaded, metadata=loaded.metadata | {"fingerprint": "0"})
    with pytest.raises(InputError, match="changed since training"):
        training_corpus(changed)


def test_a_source_is_scored_as_its_split(
    loaded: LoadedModel, corpus: Corpus, text_file: Path, tmp_path: Path
) -> None:
    write_config(loaded, str(text_file))
    counts: list[tuple[int, int]] = []
    scores, report, description = evaluate_source(
        loaded, progress=lambda count, total: counts.append((count, total))
    )
    want = evaluate_split(loaded.model, corpus.val, corpus.tokenizer, reset_at_documents=False)
    assert replace(scores, seconds=0) == replace(want, seconds=0)
    assert description == f"validation split of {text_file}"
    assert {total for _, total in counts} == {scores.tokens} == {sum(n for n, _ in counts)}
    assert sum(b["tokens"] for b in report.positions) == scores.tokens
    prepared, _, description = evaluate_source(loaded, str(corpus.path))
    assert replace(prepared, seconds=0) == replace(want, seconds=0)
    assert description == f"validation split of {corpus.path}"
    other = tmp_path / "other.txt"
    other.write_text("Every word of it. " * 50)
    scores, _, description = evaluate_source(loaded, str(other))
    assert scores.bytes == other.stat().st_size
    assert description == f"all of {other}"


def test_an_empty_text_is_an_error(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match="empty"):
        evaluate_source(loaded, str(tmp_path / "empty.txt"))
