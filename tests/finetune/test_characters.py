"""Characters that a char model has not seen get embeddings of their own, and the rest stays."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrec.checkpoint.checkpoint import LoadedModel, load_model
from mmrec.data.corpus import Corpus
from mmrec.data.prepare import prepare
from mmrec.data.tokenizer import extend_characters
from mmrec.errors import InputError
from mmrec.evaluation.source import open_split
from mmrec.finetune.grow import added_token_pieces, grow_checkpoint
from mmrec.model import Model
from mmrec.runtime.locking import FolderLock
from mmrec.training.finetuning import begin_finetuning
from mmrec.training.setup import begin_run, plan_run, resume_run
from mmrec.training.trainer import Trainer
from tests.conftest import make_trainer

NEW = "$€漢"
SETTINGS: dict[str, Any] = {
    "batch_size": 2,
    "seq_len": 32,
    "eval_every": 4,
    "save_every": 3,
    "eval_tokens": 300,
    "sample_tokens": 4,
    "keep_checkpoints": 5,
    "schedule": "constant",  # so that a shorter run is the beginning of a longer one
    "warmup": 0.0,
    "precision": "float32",
    "dropout": 0.1,
}


@pytest.fixture(scope="module")
def old_text(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("old") / "old.txt"
    path.write_text(text_file.read_text().replace("$", "")[:20_000])
    return path


@pytest.fixture(scope="module")
def source(old_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The end of a run on a text without the new characters, with its moments."""
    folder = tmp_path_factory.mktemp("char") / "run"
    corpus = Corpus.open(prepare(str(old_text), "char"))
    make_trainer(corpus, folder, tokenizer="char", steps=40).fit()
    return folder / "last.h5"


@pytest.fixture
def new_text(tmp_path: Path) -> Path:
    path = tmp_path / "new.txt"
    path.write_text("it costs $5 or €7 in 漢 and $8 in all\n" * 60)
    return path


def fit(begun: tuple[FolderLock, Trainer], *, resume: bool = False) -> Path:
    """Train to the end, and return the run folder."""
    lock, trainer = begun
    with lock:
        trainer.fit(resume=resume, lock=lock)
    return trainer.run_dir


def train(data: Path, source: Path, out: Path, **settings: Any) -> Path:
    given = {"data": str(data), "initialize_from": str(source), "out": str(out), "steps": 6}
    plan = plan_run(None, None, SETTINGS | given | settings)
    return fit(begin_run(plan, echo=lambda line: None, draw_curve=False))


def resume(run: Path, steps: int) -> Path:
    given = {"out": str(run), "steps": steps}
    return fit(resume_run(given, echo=lambda line: None, draw_curve=False), resume=True)


def rows(path: Path) -> torch.Tensor:
    return load_model(path).model.embedding.detach()


def probabilities(loaded: LoadedModel, text: str) -> torch.Tensor:
    ids = torch.from_numpy(loaded.tokenizer.encode(text))[None]
    with torch.no_grad():
        return loaded.model(ids)[0][0].softmax(-1)


def test_new_characters_leave_the_old_function_as_it_is(source: Path, tmp_path: Path) -> None:
    """Old ids and logits stay; all new rows together take little, less than the bound says."""
    old = load_model(source)
    tokenizer = extend_characters(old.tokenizer, ["$1", "€", "漢字"])
    count = tokenizer.vocab_size - old.tokenizer.vocab_size
    assert count == len("$€漢字")
    pieces = added_token_pieces(old, tokenizer)
    assert len(set(map(tuple, pieces))) == 1
    assert len(pieces) == count
    assert old.tokenizer.eot not in pieces[0]
    grown_path = tmp_path / "grown.h5"
    config = dataclasses.replace(old.model.config, vocab_size=tokenizer.vocab_size)
    grow_checkpoint(old, config, grown_path, preset="x", tokenizer=tokenizer, pieces=pieces)
    grown = load_model(grown_path)
    text = "def get(self, name): return self.headers"
    assert grown.tokenizer.encode(text).tolist() == old.tokenizer.encode(text).tolist()
    ids = torch.from_numpy(old.tokenizer.encode(text))[None]
    vocab = old.tokenizer.vocab_size
    with torch.no_grad():
        before, after = old.model(ids)[0][0], grown.model(ids)[0][0]
    assert torch.equal(after[:, :vocab], before)
    p = before.softmax(-1)
    rise = after.logsumexp(-1) - before.logsumexp(-1)
    assert (rise <= torch.log1p(count * p[:, pieces[0]].mean(1)) + 1e-6).all()
    # after 40 steps the model expects these characters once in a thousand
    assert 0 < float(rise.mean()) < count * 2e-3
    assert p[:, pieces[0]].mean() < 0.2 / vocab


def test_training_goes_on_with_new_characters_and_is_resumed_bit_for_bit(
    source: Path, new_text: Path, tmp_path: Path
) -> None:
    uncut = train(new_text, source, tmp_path / "uncut")
    vocab = len(rows(source))
    learned, start = rows(uncut / "last.h5"), rows(uncut / "step-0.h5")
    assert torch.equal(start[:vocab], rows(source))
    assert len(learned) == vocab + len(NEW)
    assert (learned[vocab:] != start[vocab:]).all()
    cut = train(new_text, source, tmp_path / "cut", steps=3)
    resume(cut, 6)
    assert torch.equal(rows(cut / "last.h5"), learned)
    loaded = load_model(uncut / "best.h5")
    text = loaded.generate("$5", max_tokens=20, seed=1)
    assert set(text) <= set(loaded.tokenizer.decode(range(1, vocab + len(NEW))))
    assert open_split(loaded)[0].n_tokens  # its own validation split is found again
    # and another text with another character, from there
    third = tmp_path / "third.txt"
    third.write_text("½ of $5, ¼ of €7\n" * 120)
    assert (
        len(rows(train(third, uncut / "last.h5", tmp_path / "third") / "last.h5"))
        == vocab + len(NEW) + 2
    )


@pytest.mark.parametrize("settings", [{"lora_rank": 4}, {"freeze": "embeddings"}])
def test_beside_frozen_embeddings_the_new_ones_learn(
    source: Path, new_text: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    uncut = train(new_text, source, tmp_path / "uncut", **settings)
    vocab, learned = len(rows(source)), rows(uncut / "last.h5")
    assert torch.equal(learned[:vocab], rows(source))
    start = rows(uncut / "step-0.h5")
    assert (learned[vocab:] != start[vocab:]).all()
    cut = train(new_text, source, tmp_path / "cut", steps=3, **settings)
    resume(cut, 6)
    assert torch.equal(rows(cut / "last.h5"), learned)


def test_finetuning_scores_and_replays_the_earlier_text(
    source: Path, old_text: Path, new_text: Path, tmp_path: Path
) -> None:
    """The earlier corpus was made by the smaller tokenizer, whose ids are the same."""
    settings = SETTINGS | {"data": str(new_text), "out": str(tmp_path / "run"), "steps": 2}
    lines: list[str] = []
    run = begin_finetuning(
        source,
        settings | {"replay_fraction": 0.5},
        old_data=str(old_text),
        echo=lines.append,
        draw_curve=False,
    )
    run.trainer.fit(lock=run.lock)
    scores = run.score_best()
    assert set(scores) == {"new", "earlier"}
    assert all(math.isfinite(v) for score in scores.values() for v in score.values())
    assert [line for line in lines if line.endswith("which get embeddings of their own: 3")]
    resume(tmp_path / "run", 3)


def test_a_prepared_corpus_may_know_fewer_characters(
    source: Path, old_text: Path, new_text: Path, tmp_path: Path
) -> None:
    """Its tokens are those of the larger tokenizer; one with another order is refused."""
    grown = train(new_text, source, tmp_path / "grown")
    corpus = prepare(str(old_text), load_model(source).tokenizer, out=tmp_path / "old.h5")
    again = train(corpus, grown / "last.h5", tmp_path / "again", steps=3)
    assert len(rows(again / "last.h5")) == len(rows(grown / "last.h5"))
    resume(again, 4)
    assert open_split(load_model(grown / "last.h5"), str(corpus))[0].n_tokens
    other = prepare(str(new_text), "char", out=tmp_path / "other.h5")
    with pytest.raises(InputError, match="must have the tokenizer of the model"):
        train(other, grown / "last.h5", tmp_path / "none")


def test_a_model_grows_in_size_and_by_characters_at_once(
    source: Path, new_text: Path, tmp_path: Path
) -> None:
    old = load_model(source)
    tokenizer = extend_characters(old.tokenizer, [new_text.read_text()])
    config = dataclasses.replace(
        old.model.config, width=48, heads=3, vocab_size=tokenizer.vocab_size
    )
    pieces = added_token_pieces(old, tokenizer)
    path = tmp_path / "grown.h5"
    model: Model = grow_checkpoint(
        old, config, path, preset="x", tokenizer=tokenizer, pieces=pieces
    )
    text = "it costs 5 or 7 in all"
    p, q = probabilities(old, text), probabilities(load_model(path), text)
    ratio = q[:, : p.shape[1]] / p
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=0)
    assert model.config.vocab_size == tokenizer.vocab_size
