"""Splits in which no text stands on both sides, and that added text does not change."""

import random
from collections.abc import Callable
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrec.data.dedup import minhash_signatures, near_duplicate_clusters
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
    documents: list[Document], options: ReadOptions | None = None, val_documents: int = 0
) -> SplitPlan:
    return plan_split(
        scan_documents(documents),
        options or ReadOptions(),
        lambda: minhash_signatures(documents, lambda size: None),
        val_documents,
    )


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


@given(
    st.lists(st.text("abc", min_size=1, max_size=30), min_size=MIN_WHOLE_DOCUMENTS, max_size=120),
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


def test_text_that_changes_while_it_is_read_is_noticed() -> None:
    documents = [Document(str(i), f"text {i}") for i in range(30)]
    plan = make_plan(documents)
    for changed in (documents[:-1], list(chain(documents, documents[:1]))):
        with pytest.raises(ValueError, match="changed while it was read"):
            list(plan.assign(changed))


def test_few_long_documents_among_short_ones_still_leave_validation() -> None:
    documents = [Document(str(i), "x" * (100_000 if i == 7 else 100) + str(i)) for i in range(40)]
    options = ReadOptions(val_fraction=0.2)
    plan = make_plan(documents, options)
    sizes = scan_documents(documents).sizes
    assert plan.splits[7] == TRAIN
    assert (plan.splits == VAL).sum() > 0
    assert sizes[plan.splits == VAL].sum() <= 0.4 * sizes.sum()
    assert not (plan.splits == DROPPED).any()
    assert np.array_equal(plan.splits, make_plan(documents, options).splits)
