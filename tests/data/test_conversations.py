"""Conversations: what a line must be, how they are split, and how they are packed into windows."""

import gzip
import itertools
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mmrec.data.chat_template import ChatTemplate
from mmrec.data.conversations import (
    chat_tokenizer,
    holds_conversations,
    prepare_conversations,
    read_conversations,
)
from mmrec.data.corpus import Corpus, Split
from mmrec.data.dataloader import IGNORED, ConversationLoader
from mmrec.data.prepare import open_corpus
from mmrec.data.readers import ReadOptions
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError
from mmrec.model import Model
from tests.conftest import SMALL
from tests.conversations import made_up_stories, message, story_conversations, write_lines

RECORDS = list(story_conversations(made_up_stories()))
HELLO, HI = message("user", "hello"), message("assistant", "hi")
TOKENIZER = chat_tokenizer(Tokenizer("byte", ""), None, "the template")
SPECIAL = TOKENIZER.special_tokens


def corpus_of(path: Path, **options: object) -> Corpus:
    read = ReadOptions(**options)  # type: ignore[arg-type]
    return Corpus.open(prepare_conversations(path, TOKENIZER, read, lambda line: None))


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("chats") / "chats.jsonl", RECORDS)


def documents(split: Split) -> list[list[int]]:
    return [
        split.tokens[begin:end].tolist() for begin, end in itertools.pairwise(split.doc_offsets)
    ]


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens)


# ---- lines


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "must be JSON, one conversation per line: "),
        ("[]", "must be a JSON object"),
        (
            {"text": "a", "id": 1},
            "must have the field 'messages', .*; its fields are: 'text', 'id'",
        ),
        ({"messages": {}}, "must hold a list of messages"),
        ({"messages": []}, "must hold messages; the list is empty"),
        ({"messages": ["hi"]}, "message 1 must hold role and content"),
        ({"messages": [HELLO, {"role": "assistant"}]}, "message 2 must hold role and content"),
        (
            {"messages": [HELLO, message("bot", "hi")]},
            "message 2 must be of one of the roles system, user, assistant; got 'bot'",
        ),
        ({"messages": [message("user", "\n "), HI]}, "message 1 must have text as .*; it is empty"),
        (
            {"messages": [HELLO, {"role": "assistant", "content": None}]},
            "message 2 must have text as content; got None",
        ),
        ({"messages": [message("user", "a\0"), HI]}, "message 1 must hold text; it has a NUL"),
        ({"messages": [HELLO]}, "must have a message of the assistant"),
        ({"messages": [HELLO, HI | {"weight": 0}]}, "must have an answer of weight 1"),
        ({"messages": [HELLO, HI | {"weight": 2}]}, "message 2 must have the weight 0 or 1; got 2"),
        ({"prompt": "a", "completion": ""}, "message 2 must have text as content; it is empty"),
        ({"prompt": 1, "completion": "b"}, "message 1 must have text as content; got 1"),
    ],
)
def test_a_line_that_is_no_conversation(line: object, problem: str, tmp_path: Path) -> None:
    """The message names file and line; with skip_bad the line is skipped and counted."""
    path = write_lines(tmp_path / "bad.jsonl", [RECORDS[0], line, RECORDS[1]])  # type: ignore[list-item]
    with pytest.raises(InputError, match=f"^{path} line 2 {problem}"):
        list(read_conversations(path, ReadOptions()))
    options = ReadOptions(skip_bad=True)
    assert [c.place for c in read_conversations(path, options)] == [
        f"{path} line {n}" for n in (1, 3)
    ]
    assert options.skipped_records == 1


def test_what_a_line_holds(tmp_path: Path) -> None:
    later = message("user", "and?")
    lines = [
        "",
        {"prompt": "a question", "completion": " an answer"},
        {"messages": [HELLO, HI | {"weight": 0}, later, HI, later], "id": 7},
    ]
    path = tmp_path / "chats.jsonl.gz"
    path.write_bytes(
        gzip.compress("\n".join(x if x == "" else json.dumps(x) for x in lines).encode())
    )
    pair, talk = read_conversations(path, ReadOptions())
    assert pair.messages == [message("user", "a question"), message("assistant", " an answer")]
    assert pair.place == f"{path} line 2"
    assert talk.messages == [HELLO, HI, later, HI]  # nothing is learnt from what follows
    assert talk.untrained == {1}
    [first] = read_conversations(path, ReadOptions(max_bytes=5))
    assert first == pair


def test_which_files_hold_conversations(chats: Path, tmp_path: Path) -> None:
    assert holds_conversations(str(chats))
    assert holds_conversations(write_lines(tmp_path / "p", [{"prompt": 1, "completion": 2}]))
    others = [
        write_lines(tmp_path / "text.jsonl", [{"text": "a"}]),
        write_lines(tmp_path / "half.jsonl", [{"prompt": "a"}]),
        tmp_path / "none.jsonl",
        tmp_path,
        "stdlib",
        "-",
        "2:a,1:b",
        ["a", "b"],
    ]
    assert not any(map(holds_conversations, others))


# ---- the corpus


def test_the_corpus_of_conversations(chats: Path) -> None:
    corpus = corpus_of(chats)
    assert corpus.tokenizer.to_json() == TOKENIZER.to_json()
    template, made = ChatTemplate(TOKENIZER.chat_template, TOKENIZER), []
    for split in (corpus.train, corpus.val):
        assert split.answers is not None
        texts = documents(split)
        assert all(tokens[-1] == TOKENIZER.eot for tokens in texts)
        made += [tuple(tokens[:-1]) for tokens in texts]
        answers = [text_of([t]) for t in split.tokens[split.answers].tolist()]
        assert len("".join(answers)) == split.n_bytes
        ends = split.tokens[split.answers] == SPECIAL["<|end|>"]
        assert ends.sum() == 2 * len(texts)
    want = {tuple(template.encode(template.parts(r["messages"]))[0]) for r in RECORDS}
    assert set(made) == want
    assert len(made) == len(want) == len(RECORDS)
    assert len(corpus.val.doc_bytes) / len(made) == pytest.approx(0.1, abs=0.03)
    place = int(corpus.info["longest"][0]["name"].rsplit(" ", 1)[1])
    longest = template.encode(template.parts(RECORDS[place - 1]["messages"]))[0]
    assert len(longest) == max(len(tokens) - 1 for tokens in documents(corpus.train))


def test_conversations_that_begin_alike_are_in_one_split(tmp_path: Path) -> None:
    """The split depends on contents, not on their order; copies are left out."""
    answers = ("One.", "Two.", "Three.")
    records = [
        {"prompt": f"Question {i}?", "completion": answer} for i in range(40) for answer in answers
    ]
    paths = [
        write_lines(tmp_path / "a.jsonl", records),
        write_lines(tmp_path / "b.jsonl", [*reversed(records), *records[:20]]),
    ]
    corpora = [corpus_of(path, val_fraction=0.25) for path in paths]
    assert [c.info["duplicates"] for c in corpora] == [0, 20]
    in_val = [{text_of(d) for d in documents(c.val)} for c in corpora]
    assert in_val[0] == in_val[1]
    assert len(in_val[0]) == 30
    questions = {text.split("?")[0] for text in in_val[0]}
    assert len(questions) == 10
    assert not any(text_of(d).split("?")[0] in questions for d in documents(corpora[0].train))


def test_validation_conversations_of_their_own(tmp_path: Path) -> None:
    """Those for training that begin like one of them are left out."""
    train = write_lines(tmp_path / "train.jsonl", RECORDS[:50])
    val = write_lines(tmp_path / "val.jsonl", RECORDS[40:60])
    corpus = corpus_of(train, val_file=str(val))
    assert (len(corpus.train.doc_bytes), len(corpus.val.doc_bytes)) == (40, 20)
    assert corpus.info["duplicates"] == 10


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_conversations_to_split(count: int, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "few.jsonl", RECORDS[:1] * count)
    rule = "must have conversations for training and for validation" if count else "is empty"
    with pytest.raises(InputError, match=f"^{path} {rule}"):
        corpus_of(path)


def test_the_corpus_is_prepared_once_and_again_after_a_change(tmp_path: Path) -> None:
    path, lines = write_lines(tmp_path / "chats.jsonl", RECORDS[:20]), list[str]()
    for _ in range(2):
        open_corpus(path, TOKENIZER, lines.append)
    assert [line.startswith(f"corpus {path}: unchanged") for line in lines] == [False, True]
    write_lines(path, RECORDS[:21])
    corpus = open_corpus(path, TOKENIZER)
    assert len(corpus.train.doc_bytes) + len(corpus.val.doc_bytes) == 21
    # a model without a template reads text, and says what takes conversations
    with pytest.raises(InputError, match=r"line 1 must have .*\(mmrec finetune RUN --chat takes"):
        open_corpus(path, Tokenizer("byte", ""))


def test_characters_of_conversations_are_added(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "chats.jsonl", RECORDS[:20])
    tokenizer = chat_tokenizer(Tokenizer("char", "abc"), None, "the template")
    with pytest.raises(InputError, match=rf"{path} line 1, line 1, character 1: the character 'T'"):
        open_corpus(path, tokenizer)
    corpus = open_corpus(path, tokenizer, add_characters=True)
    assert corpus.tokenizer.extends(tokenizer)
    assert corpus.tokenizer.special_tokens == tokenizer.special_tokens
    assert "Tell me a story" in corpus.tokenizer.decode(corpus.train.tokens[:40])
    again = open_corpus(path, corpus.tokenizer)
    assert again.train.tokens.tolist() == corpus.train.tokens.tolist()


# ---- windows


def loader_of(split: Split, batch_size: int, seq_len: int) -> ConversationLoader:
    assert split.answers is not None
    arrays = split.tokens, split.doc_offsets, split.answers
    return ConversationLoader(*arrays, batch_size, seq_len, seed=1)


def test_windows_hold_whole_conversations(chats: Path) -> None:
    corpus = corpus_of(chats)
    loader, eot = loader_of(corpus.train, 4, 1000), TOKENIZER.eot
    assert (loader.cut, loader.left_out) == (0, 0)
    assert loader.fill > 0.8
    first = [loader.batch_at(i) for i in range(loader.batches_per_epoch)]
    seen = []
    for inputs, targets in first:
        for row, row_targets in zip(inputs.numpy(), targets.numpy(), strict=True):
            starts = np.flatnonzero(row == eot)
            assert starts[0] == 0
            for begin, end in zip(starts, [*starts[1:], len(row)], strict=True):
                tokens = row[begin + 1 : end].tolist()
                learnt = row_targets[begin:end]
                assert (learnt != IGNORED).sum() > 20
                answers = "".join(text_of([t]) for t in learnt[learnt != IGNORED])
                last = np.flatnonzero(learnt != IGNORED)[-1]
                seen.append((*tokens[:last], learnt[last]))
                assert text_of(list(seen[-1])).endswith(".")
                assert answers.endswith(".")
                shown = learnt[:last][learnt[:last] != IGNORED]
                at = np.flatnonzero(learnt[:last] != IGNORED)
                assert (row[begin + 1 :][at] == shown).all()
    want = {tuple(tokens[:-1]) for tokens in documents(corpus.train)}
    assert set(seen) <= want
    assert len(set(seen)) == len(seen) > len(want) - 4 * 5  # but for the last batch
    again = loader_of(corpus.train, 4, 1000)
    second = again.batch_at(loader.batches_per_epoch + 1)  # of the next epoch, not in order
    assert torch.equal(again.batch_at(1)[0], first[1][0])
    assert torch.equal(second[0], loader.batch_at(loader.batches_per_epoch + 1)[0])
    assert not torch.equal(second[0], first[1][0])


def test_no_conversation_sees_another(chats: Path) -> None:
    """The loss of a window is that of its conversations, each alone."""
    split = corpus_of(chats).train
    inputs, targets = loader_of(split, 1, 700).batch_at(0)
    torch.manual_seed(0)
    shape = SMALL.__dict__ | {"vocab_size": TOKENIZER.vocab_size, "ngram_buckets": 64}
    model = Model(type(SMALL)(**shape)).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1
    starts = inputs[0] == TOKENIZER.eot
    bounds = [*starts.nonzero().flatten().tolist(), inputs.shape[1]]
    assert len(bounds) > 3
    with torch.no_grad():
        score = partial(model.loss, some_ignored=True)
        together = score(inputs, targets, document_starts=starts[None])[0]
        alone, count = torch.zeros(()), 0
        for begin, end in itertools.pairwise(bounds):
            part = targets[:, begin:end]
            loss, _ = score(inputs[:, begin:end], part)
            alone, count = alone + loss * (part >= 0).sum(), count + int((part >= 0).sum())
    torch.testing.assert_close(together, alone / count, rtol=1e-5, atol=1e-6)


def test_conversations_that_do_not_fit_are_cut(tmp_path: Path) -> None:
    long, short = message("assistant", "word " * 40), message("assistant", "yes")
    records = [
        *({"messages": [message("user", f"{i}?"), short]} for i in range(6)),
        {"messages": [message("user", "tell me"), long]},
        {"messages": [message("user", "word " * 40), short]},
    ]
    path = write_lines(tmp_path / "chats.jsonl", records)
    val = write_lines(tmp_path / "val.jsonl", RECORDS[:2])
    split = corpus_of(path, val_file=str(val)).train
    loader = loader_of(split, 1, 50)
    assert (loader.cut, loader.left_out) == (2, 1)
    rows = [loader.batch_at(i) for i in range(loader.batches_per_epoch)]
    [(inputs, targets)] = [(x, y) for x, y in rows if "tell me" in text_of(x[0].tolist())]
    assert "tell meword word" in text_of(inputs[0].tolist())
    assert text_of(targets[0][targets[0] >= 0].tolist()) == ("word " * 40)[: 50 - len("<tell me><")]
    with pytest.raises(InputError, match="fill 3: use more of them, a smaller batch_size"):
        loader_of(split, 4, 50)
