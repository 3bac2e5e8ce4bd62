"""From tokens to text while they are drawn: whole characters only, and an end at a stop text."""

import codecs
from collections import deque
from collections.abc import Iterable, Sequence

from mmrec.data.tokenizer import Tokenizer


class TextStream:
    """The text of tokens that come one after another, passed on as early as possible.

    Two things are held back: the bytes of a character that is not complete, and an end that may be
    the start of a stop text. Of several stop texts the one that is complete first ends the text,
    of two that are complete at the same character the longer one. So the text does not depend on
    how the tokens are divided among calls.

    Attributes:
        is_stopped: whether a stop text has come.
        settled_tokens: the number of tokens, counted from the first, that surely belong to the
            text. After a stop text these are the whole tokens before it: not the token in which it
            begins.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """Begin an empty text.

        Args:
            tokenizer: the tokenizer of the tokens.
            stop: texts that end the text and are left out of it, none of them empty.
        """
        self._token_bytes, self._stop = tokenizer.token_bytes, tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        """Text that is complete but held back."""
        self._released_chars = 0
        self._unsettled: deque[tuple[int, bool]] = deque()
        """For each token that is not settled the characters of the text up to its end, and whether
        its last character is complete. Kept only where there are stop texts."""
        self.is_stopped, self.settled_tokens = False, 0

    def feed(self, tokens: Iterable[int]) -> str:
        """Take the next tokens; return the text that they release. There are none after a stop."""
        if not self._stop:
            pieces = [self._token_bytes(token) for token in tokens]
            self.settled_tokens += len(pieces)
            return self._decoder.decode(b"".join(pieces))
        end = self._released_chars + len(self._held)
        new = []
        for token in tokens:
            new.append(self._decoder.decode(self._token_bytes(token)))
            end += len(new[-1])
            self._unsettled.append((end, not self._decoder.getstate()[0]))
        return self._release("".join(new))

    def finish(self) -> str:
        """End the text; return what was held back. Bytes that are no character become U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True), is_end=True)
        if not self.is_stopped:
            self.settled_tokens += len(self._unsettled)
            self._unsettled.clear()
        return text

    def _release(self, text: str, *, is_end: bool = False) -> str:
        self._held += text
        found = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.is_stopped, count = True, min(found)[1]
        else:
            count = len(self._held) if is_end else self._possible_start()
        released, self._held = self._held[:count], "" if found else self._held[count:]
        self._released_chars += count
        while self._unsettled:
            end, is_complete = self._unsettled[0]
            if end > self._released_chars or (end == self._released_chars and not is_complete):
                break
            self._unsettled.popleft()
            self.settled_tokens += 1
        return released

    def _possible_start(self) -> int:
        """Where the earliest start of a stop text may lie at the end of what is held back."""
        held = self._held
        earliest = len(held)
        for text in self._stop:
            at = max(0, len(held) - len(text) + 1)
            while 0 <= (at := held.find(text[0], at)) < earliest:
                if text.startswith(held[at:]):
                    earliest = at
                at += 1
        return earliest
