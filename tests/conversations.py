"""Conversations for tests, and a maker of some from a file of stories.

``python -m tests.conversations stories.txt chat.jsonl 600`` asks for the story of each hero that a
story introduces, and then for the hero's name. Heroes get new names, so that an answer has to take
its name from the question.
"""

import itertools
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
HERO = re.compile(r"\b(?:an?|the) (?:\w+ )?(\w+) named ([A-Z][a-z]+)\b")
SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"']?")
MAX_CHARS = 240

NAMES = (
    *("Lily", "Tom", "Mia", "Ben", "Anna", "Max", "Sue", "Jack", "Nora", "Sam", "Rex", "Bella"),
    *("Fin", "Daisy", "Leo", "Ruby", "Oscar", "Molly", "Pip", "Rose", "Toby", "Ella", "Hugo"),
    *("Zoe", "Bob", "Kate", "Spot", "Lucy", "Buddy", "Jane", "Sally", "Jim", "Coco"),
)
ANIMALS = ("dog", "cat", "frog", "bird", "horse", "mouse")
PLACES = ("the park", "the river", "a garden", "the old barn", "the beach")


def message(role: str, content: str, **others: Any) -> Record:
    """One message."""
    return {"role": role, "content": content, **others}


def made_up_stories() -> Iterator[str]:
    """Short stories of a hero at a place, 300 of them."""
    for name, animal, place in itertools.product(NAMES[:10], ANIMALS, PLACES):
        yield (
            f"Once there was a little {animal} named {name}. {name} went to {place} and found a "
            f"shiny stone. The {animal} was very happy."
        )


def story_conversations(
    stories: Iterable[str], names: random.Random | None = None
) -> Iterator[Record]:
    """A conversation for each story that introduces a hero by name at its beginning.

    Args:
        stories: the stories.
        names: draws a new name for each hero; None keeps the names.
    """
    for story in stories:
        text = ""
        for sentence in SENTENCE.findall(" ".join(story.split())):
            if len(text + sentence) > MAX_CHARS:
                break
            text += sentence
        hero = HERO.search(text)
        if not hero:
            continue
        kind, name = hero[1], names.choice(NAMES) if names else hero[2]
        text = text.replace(hero[2], name)
        yield {
            "messages": [
                message("user", f"Tell me a story about a {kind} named {name}."),
                message("assistant", text.strip()),
                message("user", f"What is the name of the {kind}?"),
                message("assistant", f"The {kind} is named {name}."),
            ]
        }


def short_conversations() -> Iterator[Record]:
    """Short conversations of two questions and answers, 30 of them."""
    for name, place in itertools.product(NAMES[:10], PLACES[:3]):
        yield {
            "messages": [
                message("user", f"Where is {name}?"),
                message("assistant", f"At {place}."),
                message("user", "Who?"),
                message("assistant", f"{name} is."),
            ]
        }


def write_lines(path: Path, records: Iterable[Record | str]) -> Path:
    """Write records, or lines as they are, as JSON lines; return the path."""
    lines = (r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


if __name__ == "__main__":
    source, target, count = sys.argv[1:]
    texts = Path(source).read_text(encoding="utf-8").split("<|endoftext|>")
    records = story_conversations(texts, random.Random(0))
    write_lines(Path(target), itertools.islice(records, int(count)))
