"""Splits in which no text stands on both sides, and that added text does not change."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmrec.data.dedup import near_duplicate_clusters
from mmrec.data.readers import Document, ReadOptions
from mmrec.data.split import (
    DROPPED,
    MIN_WHOLE_DOCUMENTS,
    TRAIN,
    VAL,
    SplitPlan,
    plan_split,
    scan_documents,
)

Library = Callable[[int, int, int], list[Document]]


def make_plan(
    documents: list[Document],
    options: ReadOptions | None = None,
    val_documents: int = 0,
    source_ends: Sequence[int] = (),
) -> SplitPlan:
    return plan_split(
        scan_documents(documents),
        options or ReadOptions(),
        val_documents,
        source_ends,
    )


def make_plan_without_copies(documents: list[Document], fraction: float = 0.1) -> SplitPlan:
    """The plan of documents of which no two are alike; faster than ``make_plan``."""
    unlike = np.arange(len(documents), dtype=np.uint64)[:, None]
    options = ReadOptions(val_fraction=fraction)
    return plan_split(replace(scan_documents(documents), signatures=unlike), options)


def make_documents(sizes: Sequence[int], seed: int = 0) -> list[Document]:
    """Documents of random words, of so many characters."""
    rng = random.Random(seed)
    texts = (" ".join(f"{rng.getrandbits(24):x}" for _ in range(size // 3 + 1)) for size in sizes)
    named = enumerate(zip(sizes, texts, strict=True))
    return [Document(f"{i}", text[:size]) for i, (size, text) in named]


def parts(documents: list[Document], plan: SplitPlan) -> tuple[dict[str, str], dict[str, str]]:
    """By name: the training text and the validation text of each document."""
    found: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for split, piece in plan.assign(documents):
        found[split][piece.name] = found[split].get(piece.name, "") + piece.text
    return found


def split_texts(documents: list[Document], plan: SplitPlan) -> tuple[list[str], list[str]]:
    texts: tuple[list[str], list[str]] = ([], [])
    for split, document in plan.assign(documents):
        texts[split].append(document.text)
    return texts


def test_one_file_is_cut_at_nine_tenths_in_pieces_too() -> None:
    text = "".join(chr(97 + i % 26) for i in range(1_005))
    one = [Document("a", text)]
    train, val = split_texts(one, make_plan(one))
    assert (train, val) == ([text[:904]], [text[904:]])
    pieces = [Document("a", text[lo : lo + 300], lo + 300 < 1_005) for lo in range(0, 1_005, 300)]
    assigned = list(make_plan(pieces).assign(pieces))
    for split, expected in ((TRAIN, train), (VAL, val)):
        own_pieces = [document for number, document in assigned if number == split]
        assert "".join(d.text for d in own_pieces) == expected[0]
        assert [d.more for d in own_pieces] == [True] * (len(own_pieces) - 1) + [False]


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_cut_at_the_end_of_a_piece_ends_the_training_text(pieces: int) -> None:
    text = "ab" * 5 * pieces
    size = len(text) * 9 // 10 // pieces
    bounds = [*range(0, size * pieces, size), len(text)]
    documents = [
        Document("a", text[begin:end], end < len(text))
        for begin, end in itertools.pairwise([*bounds[:-1], size * pieces, len(text)])
    ]
    assigned = list(make_plan(documents).assign(documents))
    assert [(split, d.more) for split, d in assigned] == [
        *[(TRAIN, True)] * (pieces - 1),
        (TRAIN, False),
        (VAL, False),
    ]


@given(
    st.lists(st.text("abc", min_size=10, max_size=30), min_size=MIN_WHOLE_DOCUMENTS, max_size=120),
    st.randoms(),
)
def test_many_documents_are_split_whole_and_without_leaks(
    texts: list[str], rng: random.Random
) -> None:
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    plan = make_plan(documents)
    assert plan.duplicates == len(texts) - len(set(texts))
    if len(set(texts)) >= MIN_WHOLE_DOCUMENTS:
        train, val = split_texts(documents, plan)
        assert not set(train) & set(val)
        assert sorted(train + val) == sorted(set(texts))
        val_share = sum(map(len, val)) / sum(map(len, set(texts)))
        assert 0.05 <= val_share <= 0.2 or max(map(len, texts)) > 20
        rng.shuffle(documents)
        assert set(split_texts(documents, make_plan(documents))[1]) == set(val)


def test_added_documents_move_no_others(library: Library) -> None:
    documents = library(0, 20_000, 1000)
    first = documents[: len(documents) // 2]
    before, after = (split_texts(x, make_plan(x)) for x in (first, documents))
    moved = set(before[1]) ^ (set(after[1]) & {d.text for d in first})
    assert len(moved) <= make_plan(documents).near_duplicates  # of what was added
    val_share = sum(map(len, after[1])) / sum(len(d.text) for d in documents)
    assert 0.05 < val_share < 0.2


def test_near_duplicates_are_never_in_both_splits(library: Library) -> None:
    """Sections of the standard library, each three times with some words changed."""
    rng = random.Random(0)
    originals = library(2_000, 12_000, 150)
    documents, original_of = [], {}
    for number, original in enumerate(originals):
        for copy in range(3):
            words = original.text.split(" ")
            for at in rng.sample(range(len(words)), max(1, len(words) // 200)):
                words[at] = f"changed{copy}"
            documents.append(Document(f"{number}-{copy}", " ".join(words)))
            original_of[documents[-1].text] = number
    plan = make_plan(documents)
    train, val = ({original_of[t] for t in texts} for texts in split_texts(documents, plan))
    assert plan.near_duplicates > 20
    assert len(train & val) <= 1  # each is found with a probability of 0.99 or more
    assert 5 < len(val) < 40
    unlike = make_plan([d for d in documents if d.name.endswith("-0")])
    assert unlike.near_duplicates <= 3  # documents that are not alike stay where they are


def test_clusters_are_chains_of_documents_that_share_a_band() -> None:
    signatures = np.arange(10, dtype=np.uint64).reshape(5, 2)
    signatures[1, 0] = signatures[0, 0]  # 0 and 1 agree in one band, 1 and 3 in another
    signatures[3, 1] = signatures[1, 1]
    keys = np.arange(5, dtype=np.uint64)
    clusters = near_duplicate_clusters(signatures, keys)
    assert clusters[0] == clusters[1] == clusters[3]
    assert clusters[0] in (0, 1, 3)
    assert (clusters[2], clusters[4]) == (2, 4)


def test_given_validation_text_is_kept_out_of_training(library: Library) -> None:
    texts = library(2_000, 12_000, 60)
    near = Document("near", texts[2].text.replace("self", "it", 2))
    val_documents = [texts[0], texts[1], texts[0], near]
    documents = [*val_documents, *texts]
    plan = make_plan(documents, val_documents=len(val_documents))
    train, val = split_texts(documents, plan)
    assert val == [texts[0].text, texts[1].text, near.text]
    assert train == [d.text for d in texts[3:]]
    assert (plan.duplicates, plan.near_duplicates) == (3, 1)


@given(
    st.lists(st.integers(6_000, 20_000), max_size=5),
    st.lists(st.integers(100, 500), min_size=MIN_WHOLE_DOCUMENTS, max_size=60),
    st.sampled_from([0.05, 0.1, 0.2, 0.3]),
    st.integers(0, 99),
)
@example([40_000], [50] * 29, 0.1, 0)
@example([20_000] * 3, [100] * 40, 0.1, 0)
def test_uneven_documents_give_both_splits_their_share(
    books: list[int], notes: list[int], fraction: float, seed: int
) -> None:
    documents = make_documents([*books, *notes], seed)
    plan = make_plan_without_copies(documents, fraction)
    train, val = parts(documents, plan)
    for document in documents:  # every text once, and in order
        assert train.get(document.name, "") + val.get(document.name, "") == document.text
    share = sum(map(len, val.values())) / sum(len(d.text) for d in documents)
    assert fraction / 2 <= share <= 2 * fraction
    names = {d.name for d in documents[len(books) :]}
    assert names & set(val)
    assert len(names & set(train)) >= len(names) / 4
    if len(books) == 1 and 2 * fraction * sum([*books, *notes]) < books[0] and not plan.uneven:
        assert books[0] == plan.cuts[0]  # too long for validation
    shuffled = random.Random(seed).sample(documents, len(documents))
    assert parts(shuffled, make_plan_without_copies(shuffled, fraction)) == (train, val)


@given(st.lists(st.integers(300, 50_000), min_size=20, max_size=50), st.integers(0, 99))
def test_documents_of_any_size_give_the_share(sizes: list[int], seed: int) -> None:
    documents = make_documents(sizes, seed)
    for fraction in (0.01, 0.1, 0.5):
        val = parts(documents, make_plan_without_copies(documents, fraction))[1]
        assert fraction / 2 <= sum(map(len, val.values())) / sum(sizes) <= 2 * fraction
        assert sum(len(text) < 50 for text in val.values()) <= 1  # no crumbs


def test_an_added_document_moves_few_of_uneven_ones() -> None:
    moved = []
    for seed in range(20):
        documents = make_documents([50_000] * 3 + [300] * 100, seed)
        before = make_plan_without_copies(documents[:-1])
        after = make_plan_without_copies(documents)
        assert before.uneven
        moved.append(int((before.cuts != after.cuts[:-1]).sum()))
    assert sum(moved) / len(moved) < 2


def test_long_clusters_of_near_duplicates_are_not_cut() -> None:
    """Forty near-copies, half of all text, and thirty notes of which one is long."""
    template = make_documents([2_000])[0].text
    copies = [Document(f"copy{i}", f"{template} number {i}") for i in range(40)]
    documents = [*copies, *make_documents([1_000] * 29 + [40_000], seed=1)]
    plan = make_plan(documents)
    train, val = parts(documents, plan)
    assert plan.alike == 40
    assert plan.cut_documents == 1
    assert not any(name.startswith("copy") for name in val)
    share = sum(map(len, val.values())) / sum(len(d.text) for d in documents)
    assert 0.05 <= share <= 0.2
    assert len(train) > 60


def test_only_near_duplicates_leave_no_validation() -> None:
    template = make_documents([2_000])[0].text
    copies = [Document(str(i), f"{template} number {i}") for i in range(40)]
    plan = make_plan(copies)
    assert not plan.has_both_splits
    assert (plan.duplicates, plan.alike) == (0, 40)


def test_each_source_of_a_mixture_keeps_training_text() -> None:
    for seed in range(30):  # by its hash the last one is validation text for a tenth of the seeds
        documents = make_documents([500] * 31, seed)
        whole = make_plan_without_copies(documents)
        plan = make_plan(documents, source_ends=[30, 31])
        assert np.array_equal(plan.cuts[:-1], whole.cuts[:-1])
        assert plan.cuts[-1] == (450 if whole.cuts[-1] == 0 else 500)


def test_the_split_of_the_standard_library_is_by_hash(library_documents: list[Document]) -> None:
    """Even documents go where their own hash says, whatever else is there."""
    plan = make_plan(library_documents)
    scan = scan_documents(library_documents)
    by_hash = scan.keys < np.uint64(int(0.1 * 2.0**64))
    assert not plan.uneven
    assert plan.cut_documents == 0
    different = (plan.cuts == 0) != by_hash
    assert different[plan.cuts != DROPPED].sum() <= plan.near_duplicates
