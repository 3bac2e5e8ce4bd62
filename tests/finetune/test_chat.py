"""Fine-tuning on conversations: what is learnt, resumed bit for bit, beside LoRA and freezing."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmrec.checkpoint.checkpoint import load_model
from mmrec.data.corpus import Corpus
from mmrec.data.dataloader import IGNORED
from mmrec.errors import InputError
from mmrec.evaluation.source import evaluate_source
from mmrec.training.finetuning import Finetuning, begin_finetuning
from mmrec.training.setup import resume_run
from tests.conftest import make_trainer
from tests.conversations import message, short_conversations, write_lines

SETTINGS: dict[str, Any] = {
    "batch_size": 2,
    "seq_len": 128,
    "eval_every": 3,
    "save_every": 2,
    "eval_tokens": 600,
    "sample_tokens": 4,
    "keep_checkpoints": 5,
    "schedule": "constant",  # so that a shorter run is the beginning of a longer one
    "warmup": 0.0,
    "precision": "float32",
    "dropout": 0.1,
    "steps": 4,
}


@pytest.fixture(scope="module")
def source(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model by byte that has taken two steps."""
    folder = tmp_path_factory.mktemp("source") / "run"
    make_trainer(corpus, folder, steps=2).fit()
    return folder / "best.h5"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    return write_lines(path, short_conversations())


def begin(source: Path, chats: Path, out: Path, **given: Any) -> Finetuning:
    lines: list[str] = []
    run = begin_finetuning(
        source,
        SETTINGS | {"data": str(chats), "out": str(out)} | given,
        is_chat=True,
        echo=lines.append,
        draw_curve=False,
        show_progress=False,
    )
    run.trainer.lines = lines  # type: ignore[attr-defined]
    return run


def fit(run: Finetuning) -> Path:
    with run.lock:
        run.trainer.fit(lock=run.lock)
    return run.trainer.run_dir


def parameters(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(path).model.named_parameters())


def test_the_gradient_is_that_of_the_mean_over_answer_tokens(
    source: Path, chats: Path, tmp_path: Path
) -> None:
    """Over both replicas and both batches of a step, which have different numbers of them."""
    run = begin(source, chats, tmp_path / "run", gradient_accumulation_steps=2, dropout=0.0)
    run.lock.release()
    trainer = run.trainer
    trainer.model.train()
    loss = trainer.compute_gradients(0)
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    total, count = torch.zeros(()), 0
    assert trainer.replicas.count == 2
    for batch in (0, 1):
        tokens, targets = trainer.loader.batch_at(batch)
        starts = tokens == trainer.corpus.tokenizer.eot
        logits, _ = trainer.model(tokens, document_starts=starts)
        total = total + F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        count += int((targets != IGNORED).sum())
    assert count < 2 * tokens.numel()
    (total / count).backward()
    assert loss == pytest.approx(total.item() / count, rel=1e-5)
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=2e-3, atol=2e-6)


def test_a_batch_without_answers_changes_no_gradient(
    source: Path, chats: Path, tmp_path: Path
) -> None:
    run = begin(source, chats, tmp_path / "run", dropout=0.0)
    run.lock.release()
    trainer = run.trainer
    trainer.config = trainer.config.replace(state="window")  # as of mmrec train
    assert trainer.resets_at_documents
    tokens, targets = trainer.loader.batch_at(0)
    empty = torch.full_like(targets, IGNORED)
    loss, _ = trainer.model.loss(tokens, empty, some_ignored=True)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters())


def test_a_cut_run_continues_bit_for_bit(source: Path, chats: Path, tmp_path: Path) -> None:
    uncut = fit(begin(source, chats, tmp_path / "uncut"))
    cut = fit(begin(source, chats, tmp_path / "cut", steps=2))
    given = {"out": str(cut), "steps": 4}
    lock, trainer = resume_run(given, echo=lambda line: None, draw_curve=False, show_progress=False)
    with lock:
        trainer.fit(resume=True, lock=lock)
    expected, found = parameters(uncut / "last.h5"), parameters(cut / "last.h5")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not torch.equal(expected["embedding"], parameters(source)["embedding"])
    losses = []
    for run in (uncut, cut):
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if line["kind"] in ("train", "val")])
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][-3:] == losses[1][-3:]  # two steps and the validation at the end


def test_the_model_carries_its_template_and_eval_scores_its_answers(
    source: Path, chats: Path, tmp_path: Path
) -> None:
    run = begin(source, chats, tmp_path / "run")
    lines = run.trainer.lines  # type: ignore[attr-defined]
    special = "<|user|>, <|end|>, <|assistant|>, <|system|>"
    assert f"note    special tokens new to the model: {special}" in lines
    folder = fit(run)
    scores = run.score_best()["new"]
    loaded = load_model(folder / "best.h5")
    old = load_model(source)
    assert loaded.tokenizer.extends(old.tokenizer)
    assert loaded.tokenizer.vocab_size == old.tokenizer.vocab_size + 4
    assert loaded.tokenizer.chat_template
    whole, report, description = evaluate_source(loaded)
    assert description == f"validation split of {chats} (its answers)"
    assert whole.bits_per_byte == pytest.approx(scores["after"])
    val = run.trainer.corpus.val
    assert val.answers is not None
    assert (whole.tokens, whole.bytes) == (int(val.answers.sum()), val.n_bytes)
    assert sum(b["tokens"] for b in report.positions) == whole.tokens
    assert sum(b["tokens"] for b in report.calibration) == whole.tokens
    assert report.interval is not None
    assert report.interval[0] < whole.bits_per_byte < report.interval[1]
    # each answer by itself, after the conversation before it
    nats = 0.0
    with torch.inference_mode():
        for a, b in itertools.pairwise(val.doc_offsets):
            tokens = torch.from_numpy(val.tokens[a : b - 1].astype(np.int64))
            inputs = torch.cat((torch.tensor([loaded.tokenizer.eot]), tokens[:-1]))
            logits = loaded.model(inputs[None])[0][0]
            losses = F.cross_entropy(logits, tokens, reduction="none")
            nats += float(losses[torch.from_numpy(val.answers[a : b - 1])].sum())
    assert whole.loss == pytest.approx(nats / whole.tokens, rel=1e-4)
    everything, _, description = evaluate_source(loaded, str(chats))
    assert description == f"the answers of {chats}"
    assert everything.bytes > whole.bytes


@pytest.mark.parametrize("given", [{"freeze": "embeddings"}, {"lora_rank": 2}])
def test_special_tokens_learn_beside_frozen_ones(
    given: dict[str, Any], source: Path, chats: Path, tmp_path: Path
) -> None:
    folder = fit(begin(source, chats, tmp_path / "run", steps=2, **given))
    before, after = (parameters(folder / name)["embedding"] for name in ("step-0.h5", "last.h5"))
    size = load_model(source).tokenizer.vocab_size
    assert torch.equal(before[:size], after[:size])
    assert (before[size:] != after[size:]).any(1).all()


def test_a_second_fine_tuning_keeps_the_special_tokens(
    source: Path, chats: Path, tmp_path: Path
) -> None:
    first = fit(begin(source, chats, tmp_path / "first", steps=1))
    run = begin(first / "best.h5", chats, tmp_path / "second", steps=1)
    run.lock.release()
    tokenizer = load_model(first / "best.h5").tokenizer
    assert run.trainer.corpus.tokenizer.to_json() == tokenizer.to_json()
    lines = run.trainer.lines  # type: ignore[attr-defined]
    assert not any("special tokens new" in line for line in lines)
    assert run.corpora.keys() == {"new", "earlier"}


def test_earlier_text_is_replayed_beside_conversations(
    source: Path, chats: Path, text_file: Path, tmp_path: Path
) -> None:
    """All tokens of its windows are learnt."""
    lines: list[str] = []
    given = SETTINGS | {"data": str(chats), "out": str(tmp_path / "run"), "replay_fraction": 0.5}
    run = begin_finetuning(
        source, given, is_chat=True, old_data=str(text_file), echo=lines.append, draw_curve=False
    )
    run.lock.release()
    _, targets = run.trainer.loader.batch_at(0)
    assert (targets[0] >= 0).all()
    assert (targets[1] < 0).any()
    assert np.isfinite(run.trainer.compute_gradients(0))


def test_conversations_that_are_cut_are_told(source: Path, chats: Path, tmp_path: Path) -> None:
    talk = [message("user", "a long one?"), message("assistant", "very long " * 90)]
    path = write_lines(
        tmp_path / "chats.jsonl", [*chats.read_text().splitlines(), {"messages": talk}]
    )
    val = write_lines(tmp_path / "val.jsonl", chats.read_text().splitlines()[:9])
    run = begin(source, path, tmp_path / "run", val_file=str(val))
    run.lock.release()
    [line] = [x for x in run.trainer._describe_epochs(4, 1.0) if "longer than seq_len" in x]
    count = len(path.read_text().splitlines())
    assert line == (
        "note    conversations longer than seq_len 128, which are cut there: 1, 0 of them before "
        f"their first answer and left out; the longest, {path} line {count}, has 915 tokens"
    )


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"state": "carry"}, "--state must be document with --chat, .*; got carry"),
        ({"text_field": "body"}, "--text-field has no effect with --chat: .*; got 'body'"),
        (
            {"data": "none.jsonl"},
            "--chat must be a file of JSON lines; there is none at none.jsonl",
        ),
    ],
)
def test_settings_that_do_not_suit(
    given: dict[str, Any], problem: str, source: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"^{problem}"):
        begin(source, chats, tmp_path / "run", **given)
