"""A chat with a model that has a chat template: messages, and the state that has read them."""

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Self

import h5py
import numpy as np

from mmrec.checkpoint.hdf5 import open_h5_file, read_array, read_json, write_array, write_json
from mmrec.data.chat_template import ChatTemplate, Message
from mmrec.data.readers import ReadOptions
from mmrec.errors import InputError
from mmrec.inference.decoder import Decoder
from mmrec.inference.engine import Handle, Request
from mmrec.inference.session import KIND, READ_CHUNK, SCHEMA, Session


class ChatSession(Session):
    """A session whose text is what the chat template of its model makes of messages.

    ``read`` says something as the user, and ``generate`` lets the model answer, up to the token
    that ends its turn. The server gives the same answer to the same messages and seed.

    >>> chat = ChatSession(Decoder.load(Path("runs/tiny-chat/best.h5")))  # doctest: +SKIP
    >>> chat.read("What is the capital of France?")  # doctest: +SKIP
    >>> "".join(chat.generate(seed=1))  # doctest: +SKIP

    Attributes:
        messages: what was said, each with ``role`` and ``content``.
        is_complete: whether the model has ended its newest answer. If not, it can go on.
    """

    def __init__(self, decoder: Decoder, system: str = "") -> None:
        """Begin.

        Args:
            decoder: a model with a chat template.
            system: the message of the system, before all others; empty for none.

        Raises:
            InputError: the model has no chat template, or refuses the message of the system.
        """
        super().__init__(decoder)
        source = decoder.tokenizer.chat_template
        if not source:
            raise InputError("the model has no chat template: mmrec finetune RUN --chat gives one")
        self._template = ChatTemplate(source, decoder.tokenizer)
        self._system = system
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.is_complete = True
        self._ids: list[int] = []
        """Tokens that the state has read."""
        if system:
            self._template.prompt(self.messages)

    def fresh(self) -> "ChatSession":
        """Return a chat with the same model and message of the system, without other messages."""
        return ChatSession(self.decoder, self._system)

    def fork(self) -> "ChatSession":
        """Return a chat at the same place, independent of this one."""
        fork = self.fresh()
        fork._put(self.state.copy(), self._text)
        fork.messages, fork._ids = [dict(m) for m in self.messages], list(self._ids)
        fork.is_complete = self.is_complete
        return fork

    def read(
        self,
        text: str | Path,
        *,
        options: ReadOptions | None = None,
        progress: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Say something as the user. Nothing changes if an error or an interrupt ends the call.

        Args:
            text: The message. Empty lets the model go on with an answer that it has not ended.
            options: Not used: a chat reads no files.
            progress: Called with the number of tokens just read.

        Raises:
            InputError: The message is a path, the template refuses it, it holds a character that a
                ``char`` tokenizer does not know, or it is empty and there is nothing to go on with.
        """
        if not isinstance(text, str):
            raise InputError(f"a message must be of type str; got {text!r}")
        if not text:
            if self.is_complete:
                raise InputError("there is no answer to go on with: write a message")
            return
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._template.prompt(messages)
        if ids[: len(self._ids)] == self._ids:
            state, unread = self.state.copy(), ids[len(self._ids) :]
        else:  # the answer was not drawn in the tokens that its text has
            state, unread = self.decoder.initial_state(), ids
        for begin in range(0, len(unread), READ_CHUNK):
            chunk = unread[begin : begin + READ_CHUNK]
            self.decoder.read(state, chunk)
            progress(len(chunk))
        self._put(state, self._newest_text(ids))
        self.messages, self._ids, self.is_complete = messages, ids, True

    def _newest_text(self, ids: list[int]) -> bytes:
        return b"".join(map(self.decoder.tokenizer.token_bytes, ids[-READ_CHUNK:]))

    def stream(self, request: Request) -> Generator[str, None, None]:
        """Let the model answer; see ``generate``. The request must have no prompt.

        Raises:
            InputError: The request does not suit the model.
        """
        return super().stream(replace(request, stop_token=self._template.end_of_turn))

    def _take(self, handle: Handle) -> None:
        super()._take(handle)
        completion = self.completion
        assert completion is not None
        self._ids = [*self._ids, *completion.tokens]
        if self.messages and self.messages[-1]["role"] == "assistant":
            answer = self.messages.pop()["content"] + completion.text
        else:
            answer = completion.text
        self.messages.append({"role": "assistant", "content": answer})
        self.is_complete = completion.finish_reason == "stop"

    def _store(self, file: h5py.File) -> None:
        super()._store(file)
        write_json(file, "chat", {"messages": self.messages, "is_complete": self.is_complete})
        write_array(file, "tokens", np.array(self._ids, np.int64))

    @classmethod
    def load(cls, path: str | Path, decoder: Decoder) -> Self:
        """Read a chat from a file; see ``Session.load``.

        Raises:
            InputError: There is no intact session at ``path``, it is of another model, or it holds
                a text and no chat.
        """
        path, session = Path(path), cls(decoder)
        text = Session.load(path, decoder)
        session._put(text.state, text._text)
        with open_h5_file(path, KIND, SCHEMA) as file:
            if "chat" not in file:
                raise InputError(f"{path} must be a session of mmrec chat; it holds a text")
            chat = read_json(file, "chat")
            ids = read_array(file, "tokens", np.int64)
            messages = [{k: str(m[k]) for k in ("role", "content")} for m in chat["messages"]]
            if len(ids) and not 0 <= ids.min() <= ids.max() < decoder.config.vocab_size:
                raise ValueError("tokens must hold token ids")
            session.messages, session._ids = messages, ids.tolist()
            session.is_complete = bool(chat["is_complete"])
        if messages and messages[0]["role"] == "system":
            session._system = messages[0]["content"]
        return session
