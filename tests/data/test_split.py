"""A split that leaks nothing, and that what is added later does not change."""

import random
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrec.data.readers import Document, Reading
from mmrec.data.sources import documents
from mmrec.data.split import DROPPED, FEW, TRAIN, VAL, Plan, scan, sketches, split


def plan(texts: list[Document], how: Reading | None = None, given: int = 0) -> Plan:
    return split(scan(texts), how or Reading(), lambda: sketches(texts, lambda n: None), given)


def sides(texts: list[Document], made: Plan) -> tuple[list[str], list[str]]:
    dealt: tuple[list[str], list[str]] = ([], [])
    for side, d in made.deal(texts):
        dealt[side].append(d.text)
    return dealt


def test_one_file_is_cut_at_nine_tenths_in_pieces_too() -> None:
    text = "".join(chr(97 + i % 26) for i in range(1_005))
    one = [Document("a", text)]
    train, val = sides(one, plan(one))
    assert (train, val) == ([text[:904]], [text[904:]])
    pieces = [Document("a", text[lo : lo + 300], lo + 300 < 1_005) for lo in range(0, 1_005, 300)]
    dealt = list(plan(pieces).deal(pieces))
    for side, whole in ((TRAIN, train), (VAL, val)):
        mine = [d for number, d in dealt if number == side]
        assert "".join(d.text for d in mine) == whole[0]
        assert [d.more for d in mine] == [True] * (len(mine) - 1) + [False]


@given(st.lists(st.text("abc", min_size=1, max_size=30), min_size=FEW, max_size=120), st.randoms())
def test_many_documents_are_split_whole_and_without_leaks(
    texts: list[str], rng: random.Random
) -> None:
    found = [Document(str(i), t) for i, t in enumerate(texts)]
    made = plan(found)
    assert made.duplicates == len(texts) - len(set(texts))
    if len(set(texts)) >= FEW:
        train, val = sides(found, made)
        assert not set(train) & set(val)
        assert sorted(train + val) == sorted(set(texts))
        held = sum(map(len, val)) / sum(map(len, set(texts)))
        assert 0.05 <= held <= 0.2 or max(map(len, texts)) > 20
        rng.shuffle(found)
        assert set(sides(found, plan(found))[1]) == set(val)


def test_what_is_added_moves_nothing() -> None:
    texts = [d for d in documents("stdlib") if len(d.text) < 20_000]
    first, later = texts[: len(texts) // 2], texts
    before, after = (sides(x, plan(x)) for x in (first, later))
    moved = set(before[1]) ^ (set(after[1]) & {d.text for d in first})
    assert len(moved) <= plan(later).near  # only what turned out to be like what came
    held = sum(map(len, after[1])) / sum(len(d.text) for d in later)
    assert 0.05 < held < 0.2


def test_nearly_the_same_is_never_on_both_sides() -> None:
    """Files of the standard library, each three times with some words changed."""
    rng = random.Random(0)
    originals = [d for d in documents("stdlib") if 2_000 < len(d.text) < 12_000][:150]
    texts, family = [], {}
    for number, d in enumerate(originals):
        for copy in range(3):
            words = d.text.split(" ")
            for at in rng.sample(range(len(words)), max(1, len(words) // 200)):
                words[at] = f"changed{copy}"
            texts.append(Document(f"{number}-{copy}", " ".join(words)))
            family[texts[-1].text] = number
    made = plan(texts)
    train, val = ({family[t] for t in side} for side in sides(texts, made))
    assert made.near > 20
    assert len(train & val) <= 1  # each is found with a probability of 0.99 or more
    assert 5 < len(val) < 40
    alone = plan([d for d in texts if d.name.endswith("-0")])
    assert alone.near <= 3  # and what is not alike stays where it is


def test_a_given_split_keeps_its_text_out_of_training(text_file: Path) -> None:
    texts = [d for d in documents("stdlib") if 2_000 < len(d.text) < 12_000][:60]
    held = [texts[0], texts[1], texts[0], Document("near", texts[2].text.replace("self", "it", 2))]
    both = [*held, *texts]
    made = plan(both, given=len(held))
    train, val = sides(both, made)
    assert val == [texts[0].text, texts[1].text, held[3].text]
    assert train == [d.text for d in texts[3:]]
    assert (made.duplicates, made.near) == (3, 1)


def test_text_that_changes_while_it_is_read_is_noticed() -> None:
    texts = [Document(str(i), f"text {i}") for i in range(30)]
    made = plan(texts)
    for changed in (texts[:-1], list(chain(texts, texts[:1]))):
        with pytest.raises(ValueError, match="changed while it was read"):
            list(made.deal(changed))


def test_few_long_documents_among_short_ones_still_leave_validation() -> None:
    texts = [Document(str(i), "x" * (100_000 if i == 7 else 100) + str(i)) for i in range(40)]
    made = plan(texts, Reading(val_share=0.2))
    sizes = scan(texts).sizes
    assert made.sides[7] == TRAIN
    assert (made.sides == VAL).sum() > 0
    assert sizes[made.sides == VAL].sum() <= 0.4 * sizes.sum()
    assert not (made.sides == DROPPED).any()
    assert np.array_equal(made.sides, plan(texts, Reading(val_share=0.2)).sides)
