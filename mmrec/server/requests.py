"""Bodies of requests in the shape of OpenAI's API: every value is checked here, once."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmrec.config import TRAIN_SETTINGS, SamplingConfig, ServerConfig, Setting
from mmrec.data.chat_template import ChatTemplate
from mmrec.data.tokenizer import Tokenizer
from mmrec.errors import InputError, RequestError, did_you_mean

DEFAULT_TOKENS = 16
"""Tokens of a completion that asks for no number, as in OpenAI's API."""
MAX_LOGPROBS = 20
"""Most alternatives of a token."""
MAX_STOPS = 16
"""Most stop texts of a request."""
ROLES = ("system", "developer", "user", "assistant")
"""Who may say something in a chat."""
MAX_SHOWN = 200
"""Characters of an error message, which may hold what the client sent."""
MAX_LOGPROB_ENTRIES = 1 << 18
"""Most log-probabilities of an answer, alternatives included."""

SAMPLING = {
    **SamplingConfig.settings(),
    # as in OpenAI's API: without settings, tokens are drawn from the model's own distribution
    "temperature": dataclasses.replace(SamplingConfig.settings()["temperature"], default=1.0),
    "top_p": dataclasses.replace(SamplingConfig.settings()["top_p"], default=1.0),
}
"""The settings of sampling, which are parameters of a request."""
COMMON = (
    *("model", "stream", "stream_options", "n", "stop", "seed", "logit_bias", "logprobs"),
    "user",
)
"""The parameters that both kinds of request have."""
COMPLETION = (*COMMON, *SAMPLING, "prompt", "max_tokens", "echo", "suffix", "best_of")
"""Every parameter of a completion."""
CHAT = (
    *(*COMMON, *SAMPLING, "messages", "max_tokens", "max_completion_tokens", "top_logprobs"),
    "response_format",
)
"""Every parameter of a chat completion."""


@dataclass(frozen=True)
class TextRequest:
    """A request for texts, checked."""

    prompts: tuple[tuple[int, ...], ...]
    """Token ids of each prompt."""
    n: int
    """Texts per prompt."""
    sampling: SamplingConfig
    max_tokens: int
    stop: tuple[str, ...]
    stop_token: int | None
    """Ends an answer of a chat; None for a completion."""
    seed: int | None
    logit_bias: Mapping[int, float]
    logprobs: int | None
    """Alternatives of each token whose log-probabilities are asked for; None for none at all."""
    echo: bool
    """Whether the prompt is part of the text."""
    stream: bool
    include_usage: bool
    """Whether a stream ends with the numbers of tokens."""


class RequestReader:
    """Reads the bodies of requests to one model."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        limits: ServerConfig,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        """Create a reader.

        Args:
            name: the name of the model.
            tokenizer: that of the model.
            limits: what a request may ask for.
            chat_template: makes the prompt of a chat; None if the model has none.
        """
        self._name, self._tokenizer, self._limits = name, tokenizer, limits
        self._chat_template = chat_template

    def check_model(self, name: object) -> None:
        """Check that a request is for the model that is served.

        Raises:
            RequestError: it is for another one.
        """
        if name is None:
            raise RequestError("you must provide a model parameter", param="model")
        if name != self._name:
            raise RequestError(
                _short(f"the model {name!r} does not exist; this server has {self._name!r}"),
                status=404,
                param="model",
                code="model_not_found",
            )

    def completion(self, body: bytes) -> TextRequest:
        """Read the body of ``/v1/completions``.

        Raises:
            RequestError: it is no JSON, or a value is not as OpenAI's API or the limits want it.
        """
        values = self._values(body, COMPLETION)
        prompts = self._prompts(values.get("prompt", ""))
        n = _number(values, _count("n", 1, 1, self._limits.max_choices))
        if len(prompts) * n > self._limits.max_choices:
            raise RequestError(
                f"a request may have {self._limits.max_choices} texts; got {len(prompts)} prompts "
                f"with n {n}",
                param="n",
            )
        if values.get("best_of", n) != n:
            raise RequestError("best_of must be n: every text is returned", param="best_of")
        if values.get("suffix", "") != "":
            raise RequestError("suffix is not possible: the model reads forward", param="suffix")
        return self._request(
            values,
            prompts,
            n,
            max_tokens=_number(
                values,
                _count("max_tokens", DEFAULT_TOKENS, 0, self._limits.max_tokens),
            ),
            logprobs=_number(values, self._alternatives("logprobs")),
            stop_token=None,
            echo=_flag(values, "echo"),
        )

    def chat(self, body: bytes) -> TextRequest:
        """Read the body of ``/v1/chat/completions``.

        Raises:
            RequestError: as in ``completion``, or the model has no chat template.
        """
        values = self._values(body, CHAT)
        template = self._chat_template
        if template is None:
            raise RequestError(
                f"the model {self._name!r} has no chat template; use /v1/completions, or start the "
                "server with --chat-template",
                code="no_chat_template",
            )
        messages = _messages(values.get("messages"))
        prompt = self._encoded("messages", lambda: template.prompt(messages))
        if values.get("response_format", {"type": "text"}) != {"type": "text"}:
            raise RequestError(
                "response_format must be of type text; no other is possible",
                param="response_format",
            )
        limit = self._limits.max_tokens
        max_tokens = _number(values, _count("max_tokens", limit, 0, limit))
        alternatives = _number(values, self._alternatives("top_logprobs"))
        wants_logprobs = _flag(values, "logprobs")
        if alternatives is not None and not wants_logprobs:
            raise RequestError("top_logprobs has no effect without logprobs", param="top_logprobs")
        return self._request(
            values,
            (prompt,),
            _number(values, _count("n", 1, 1, self._limits.max_choices)),
            max_tokens=_number(values, _count("max_completion_tokens", max_tokens, 0, limit)),
            logprobs=(alternatives or 0) if wants_logprobs else None,
            stop_token=template.end_of_turn,
            echo=False,
        )

    def _alternatives(self, name: str) -> Setting:
        return _count(name, None, 0, min(MAX_LOGPROBS, self._tokenizer.vocab_size))

    def _values(self, body: bytes, known: tuple[str, ...]) -> dict[str, Any]:
        """Read JSON; return the parameters that are given, without those that are null."""
        try:
            values = json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise RequestError(_short(f"the body must be JSON: {reason}")) from None
        if not isinstance(values, dict):
            raise RequestError(f"the body must be a JSON object; got {_kind(values)}")
        for name in values:
            if name not in known:
                hint = did_you_mean(name[:MAX_SHOWN], known)
                raise RequestError(_short(f"unknown parameter {name!r}") + hint, param=_short(name))
        given = {name: value for name, value in values.items() if value is not None}
        self.check_model(given.get("model"))
        return given

    def _request(
        self, values: dict[str, Any], prompts: tuple[tuple[int, ...], ...], n: int, **others: Any
    ) -> TextRequest:
        stream = _flag(values, "stream")
        if not isinstance(values.get("user", ""), str):
            raise RequestError("user must be text", param="user")
        self._check_logprobs(prompts, n, others)
        return TextRequest(
            prompts,
            n,
            sampling=SamplingConfig(**{name: _number(values, s) for name, s in SAMPLING.items()}),
            stop=self._stop(values.get("stop", ())),
            seed=_number(values, dataclasses.replace(TRAIN_SETTINGS["seed"], default=None)),
            logit_bias=self._logit_bias(values.get("logit_bias", {})),
            stream=stream,
            include_usage=_include_usage(values, stream),
            **others,
        )

    def _check_logprobs(
        self, prompts: tuple[tuple[int, ...], ...], n: int, asked: dict[str, Any]
    ) -> None:
        """Refuse an answer that would take the server long to write."""
        if asked["logprobs"] is None:
            return
        tokens = n * len(prompts) * asked["max_tokens"]
        tokens += n * sum(map(len, prompts)) if asked["echo"] else 0
        count = tokens * (1 + asked["logprobs"])
        if count > MAX_LOGPROB_ENTRIES:
            raise RequestError(
                f"an answer may have {MAX_LOGPROB_ENTRIES} log-probabilities; this one may need "
                f"{count}: texts times tokens times alternatives",
                param="logprobs",
            )

    def _prompts(self, prompt: Any) -> tuple[tuple[int, ...], ...]:
        """Token ids of a text, a list of texts, token ids, or lists of token ids."""
        is_list = isinstance(prompt, list) and prompt != []
        several = prompt if is_list and not _is_integer(prompt[0]) else [prompt]
        if len(several) > self._limits.max_choices:
            raise RequestError(
                f"a request may have {self._limits.max_choices} prompts; got {len(several)}",
                param="prompt",
            )
        if is_list and any(type(p) is not type(several[0]) for p in several):
            raise RequestError("prompts must all be texts, or all be token ids", param="prompt")
        return tuple(self._prompt_ids(p) for p in several)

    def _prompt_ids(self, prompt: Any) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return self._encoded(
                "prompt", lambda: self._tokenizer.encode(prompt, "the prompt").tolist()
            )
        if not isinstance(prompt, list) or not prompt or not all(map(_is_integer, prompt)):
            raise RequestError(
                "prompt must be a text, a list of texts, token ids, or a list of lists of token "
                f"ids; got {_kind(prompt)}",
                param="prompt",
            )
        size = self._tokenizer.vocab_size
        wrong = next((token for token in prompt if not 0 <= token < size), None)
        if wrong is not None:
            raise RequestError(
                _short(f"token ids of the prompt must lie in 0 to {size - 1}; got {wrong}"),
                param="prompt",
            )
        return self._check_length("prompt", tuple(prompt))

    def _encoded(self, param: str, encode: Callable[[], list[int]]) -> tuple[int, ...]:
        try:
            return self._check_length(param, tuple(encode()))
        except RequestError:
            raise
        except InputError as error:  # a character that the tokenizer does not know
            raise RequestError(str(error), param=param) from None

    def _check_length(self, param: str, tokens: tuple[int, ...]) -> tuple[int, ...]:
        limit = self._limits.max_prompt_tokens
        if len(tokens) > limit:
            raise RequestError(
                f"the prompt may have {limit} tokens; got {len(tokens)}",
                param=param,
                code="context_length_exceeded",
            )
        return tokens

    def _stop(self, stop: Any) -> tuple[str, ...]:
        texts = (stop,) if isinstance(stop, str) else tuple(stop) if _is_list(stop) else (None,)
        if not all(isinstance(text, str) and text for text in texts) or len(texts) > MAX_STOPS:
            raise RequestError(
                f"stop must be a text or up to {MAX_STOPS} texts, none of them empty", param="stop"
            )
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise RequestError("stop holds half of a surrogate pair", param="stop") from None
        return texts

    def _logit_bias(self, biases: Any) -> dict[int, float]:
        if not isinstance(biases, dict):
            raise RequestError(
                f"logit_bias must map token ids to numbers; got {_kind(biases)}", param="logit_bias"
            )
        size = self._tokenizer.vocab_size
        for token, bias in biases.items():
            is_id = token.isascii() and token.isdecimal() and len(token) < 12
            if not (is_id and int(token) < size):
                raise RequestError(
                    _short(f"token ids of logit_bias must lie in 0 to {size - 1}; got {token!r}"),
                    param="logit_bias",
                )
            if not (_is_number(bias) and -100 <= bias <= 100):
                raise RequestError(
                    _short(f"logit_bias must lie in -100 to 100; got {bias!r}"), param="logit_bias"
                )
        return {int(token): float(bias) for token, bias in biases.items()}


def _count(name: str, default: int | None, minimum: int, maximum: int) -> Setting:
    return Setting(
        name, name, "request", int, default is None, default, "", minimum, max(minimum, maximum)
    )


def _number(values: dict[str, Any], declared: Setting) -> Any:
    """The value of a parameter, checked as a setting; its default if it is not given."""
    name = declared.name
    try:
        return declared.check(values[name]) if name in values else declared.default
    except InputError as error:
        raise RequestError(_short(str(error)), param=name) from None


def _flag(values: dict[str, Any], name: str) -> bool:
    value = values.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false; got {_kind(value)}", param=name)
    return value


def _include_usage(values: dict[str, Any], stream: bool) -> bool:
    options = values.get("stream_options", {})
    if not isinstance(options, dict) or not options.keys() <= {"include_usage"}:
        raise RequestError("stream_options may hold include_usage", param="stream_options")
    if options and not stream:
        raise RequestError("stream_options has no effect without stream", param="stream_options")
    return _flag({k: v for k, v in options.items() if v is not None}, "include_usage")


def _messages(messages: Any) -> list[dict[str, str]]:
    """Roles and texts of a chat; a text may come in parts."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of messages, not empty", param="messages")
    return [_message(i, message) for i, message in enumerate(messages)]


def _message(index: int, message: Any) -> dict[str, str]:
    name = f"messages[{index}]"
    if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
        raise RequestError(f"{name} must hold role and content", param=name)
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise RequestError(
            _short(f"the role of {name} must be one of {', '.join(ROLES)}; got {role!r}"),
            param=f"{name}.role",
        )
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    is_text = all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
        for p in parts
    )
    if not is_text:
        raise RequestError(
            f"the content of {name} must be text, or parts of type text", param=f"{name}.content"
        )
    return {"role": role, "content": "".join(p["text"] for p in parts)}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it has no {name}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_integer(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _kind(value: Any) -> str:
    """A value as JSON names its kind."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")


def _short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
