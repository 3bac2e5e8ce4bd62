"""Answers in the shape of OpenAI's API."""

import codecs
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from mmrec.data.tokenizer import Tokenizer
from mmrec.inference.engine import TopTokens

SERVER_ERROR, REQUEST_ERROR, LIMIT_ERROR = (
    "server_error",
    "invalid_request_error",
    "rate_limit_error",
)


def error_body(
    message: str, status: int, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an answer that reports an error."""
    kind = SERVER_ERROR if status >= 500 else LIMIT_ERROR if status == 429 else REQUEST_ERROR
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Numbers of tokens of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text. Bytes that are no character are written as ``bytes:\\xe2``."""
    if name := tokenizer.special_name(token):
        return name
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class CompletionShape:
    """The answers of ``/v1/completions``."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def text(self, text: str, *, is_stream: bool) -> dict[str, Any]:
        """The part of a choice that holds its text."""
        return {"text": text}

    def logprobs(
        self, tokens: Sequence[int], logprobs: Sequence[float], top_logprobs: Sequence[TopTokens]
    ) -> dict[str, Any]:
        """The part of a choice that holds log-probabilities, of the tokens that come next.

        Args:
            tokens: ids.
            logprobs: of each.
            top_logprobs: the most likely tokens at the place of each.
        """
        offsets = []
        for token in tokens:  # where the first character begins that the token is a part of
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
        return {
            "tokens": [token_text(self._tokenizer, token) for token in tokens],
            "token_logprobs": list(logprobs),
            "top_logprobs": [
                {token_text(self._tokenizer, token): value for token, value in top}
                for top in top_logprobs
            ],
            "text_offset": offsets,
        }


class ChatShape:
    """The answers of ``/v1/chat/completions``."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._has_begun = False

    def text(self, text: str, *, is_stream: bool) -> dict[str, Any]:
        """As in ``CompletionShape``."""
        if not is_stream:
            return {"message": {"role": "assistant", "content": text, "refusal": None}}
        role = {} if self._has_begun else {"role": "assistant"}
        self._has_begun = True
        return {"delta": {**role, "content": text}}

    def logprobs(
        self, tokens: Sequence[int], logprobs: Sequence[float], top_logprobs: Sequence[TopTokens]
    ) -> dict[str, Any]:
        """As in ``CompletionShape``."""
        return {
            "content": [
                self._entry(token, value)
                | {"top_logprobs": [self._entry(other, x) for other, x in top]}
                for token, value, top in zip(tokens, logprobs, top_logprobs, strict=True)
            ],
            "refusal": None,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(self._tokenizer, token),
            "logprob": logprob,
            "bytes": list(self._tokenizer.token_bytes(token)),
        }


Shape = CompletionShape | ChatShape


class Envelope:
    """What all answers to one request have in common."""

    def __init__(self, shape: type[Shape], model: str, fingerprint: str) -> None:
        """Create it.

        Args:
            shape: the kind of the answers.
            model: the name of the model.
            fingerprint: that of the model.
        """
        self._shape = shape
        self._common = {
            "id": f"{shape.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, choices: list[dict[str, Any]], tokens: dict[str, int]) -> dict[str, Any]:
        """The answer that holds everything."""
        return {"object": self._shape.kind, **self._common, "choices": choices, "usage": tokens}

    def chunk(self, choices: list[dict[str, Any]], tokens: dict[str, int] | None = None) -> bytes:
        """An event of a stream."""
        values = {"object": self._shape.chunk_kind, **self._common, "choices": choices}
        return event(values if tokens is None else values | {"usage": tokens})


def event(values: dict[str, Any]) -> bytes:
    """Values as a server-sent event."""
    return b"data: " + to_json(values) + b"\n\n"


DONE = b"data: [DONE]\n\n"
"""The event that ends a stream."""


def to_json(values: Any) -> bytes:
    """Values as JSON. What a client sent may hold halves of surrogate pairs, so it is ASCII."""
    return json.dumps(values, separators=(",", ":"), allow_nan=False).encode()
