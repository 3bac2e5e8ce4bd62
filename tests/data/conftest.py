"""Documents of the standard library, read once."""

from collections.abc import Callable

import pytest

from mmrec.data.readers import Document
from mmrec.data.stdlib import stdlib_documents


@pytest.fixture(scope="session")
def library_documents() -> list[Document]:
    """All documents of the default corpus."""
    return list(stdlib_documents())


@pytest.fixture
def library(library_documents: list[Document]) -> Callable[[int, int, int], list[Document]]:
    """A function (min_chars, max_chars, count) that returns documents of such lengths."""

    def select(min_chars: int, max_chars: int, count: int) -> list[Document]:
        fitting = [d for d in library_documents if min_chars < len(d.text) < max_chars]
        return fitting[:count]

    return select
