"""Requests as clients send them: every field is honoured, known to change nothing, or refused.

Checks types; which values make sense is the engine's to say (`SamplingParams`).
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from moe_jax.server.errors import ApiError

# What is refused: the values that ask for nothing, and why any other cannot be honoured.
_Refusals = dict[str, tuple[tuple[object, ...], str]]
_NOT_HERE = "this server does not support it"
_TEXT_ONLY = "this server takes and gives text only"
_NO_TOOLS = "this server calls no tools; describe them in a message"

_REFUSED: _Refusals = {
    "store": ((False,), "this server stores nothing"),
    "service_tier": (("auto", "default"), "use priority (a whole number, higher is sooner)"),
}
_REFUSED_IN_COMPLETIONS: _Refusals = _REFUSED | {
    "best_of": ((1,), "ask for n samples and choose, or use num_beams"),
    "echo": ((False,), "the prompt is not repeated; put it before the text yourself"),
    "suffix": (("",), "models here only continue a text"),
}
_REFUSED_IN_CHAT: _Refusals = _REFUSED | {
    "audio": ((), _TEXT_ONLY),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "modalities": ((["text"],), _TEXT_ONLY),
    "parallel_tool_calls": ((True, False), _NO_TOOLS),
    "prediction": ((), _NOT_HERE),
    "reasoning_effort": ((), _NOT_HERE),
    "response_format": (({"type": "text"},), "answers are free text; ask for a form in a message"),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "tools": (([],), _NO_TOOLS),
    "verbosity": ((), _NOT_HERE),
    "web_search_options": ((), _NOT_HERE),
}
_REFUSED_IN_MESSAGES: _Refusals = {
    "audio": ((), _TEXT_ONLY),
    "function_call": ((), _NO_TOOLS),
    "refusal": ((), _NOT_HERE),
    "tool_call_id": ((), _NO_TOOLS),
    "tool_calls": (([],), _NO_TOOLS),
}


class _Strict(BaseModel):
    """No unknown fields, and no text where a number belongs."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream carries besides its text."""

    include_usage: bool = False
    include_obfuscation: bool = False

    @field_validator("include_obfuscation")
    @classmethod
    def _not_padded(cls, value: bool) -> bool:
        if value:
            raise ValueError("events are not padded here; leave it out")
        return value


class SharedRequest(_Strict):
    """Fields of both kinds of request; None means what leaving it out means."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: list[str] | None = None
    seed: int | None = None
    # These change nothing in an answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # These go beyond OpenAI's; its Python client sends them in extra_body.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    ignore_eos: bool | None = None
    priority: int | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _as_strings(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens.

        Raises ApiError (400) if there are options of a stream without a stream.
        """
        if self.stream_options is None:
            return False
        if not self.stream:
            raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
        return self.stream_options.include_usage


class CompletionRequest(SharedRequest):
    """The body of /v1/completions."""

    prompt: list[Any]
    logprobs: int | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> list[Any]:
        """Several prompts of one kind; one becomes a list of one."""
        if isinstance(value, str) or (value and _is_tokens(value)):
            return [value]
        if not isinstance(value, list) or not value:
            raise ValueError("give a text, a list of token ids, or a list of either")
        if all(isinstance(item, str) for item in value) or all(map(_is_tokens, value)):
            return value
        raise ValueError("give a text, a list of whole numbers, or a list of either, no mixture")


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) for item in value
    )


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a chat."""

    role: str
    content: list[TextPart]
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, value: Any) -> list[Any]:
        """A text becomes a list of one part."""
        if isinstance(value, str):
            return [{"type": "text", "text": value}]
        if not isinstance(value, list):
            raise ValueError("give a text or a list of text parts")
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                raise ValueError(f"only parts of type 'text' are supported, not {kind!r}")
        return value

    def plain(self) -> dict[str, str]:
        """The message as chat templates know it."""
        content = "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name else {})


class ChatRequest(SharedRequest):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


def read_completion_request(body: Mapping[str, object]) -> CompletionRequest:
    """Raises ApiError (400) that names the field that is wrong."""
    return _validate(CompletionRequest, _without_refused(body, _REFUSED_IN_COMPLETIONS))


def read_chat_request(body: Mapping[str, object]) -> ChatRequest:
    """Raises ApiError (400) that names the field that is wrong."""
    fields = _without_refused(body, _REFUSED_IN_CHAT)
    messages = fields.get("messages")
    if isinstance(messages, list):
        fields["messages"] = [
            _without_refused(message, _REFUSED_IN_MESSAGES, f"messages.{index}.")
            if isinstance(message, dict)
            else message
            for index, message in enumerate(messages)
        ]
    return _validate(ChatRequest, fields)


def _without_refused(
    fields: Mapping[str, object], refused: _Refusals, where: str = ""
) -> dict[str, object]:
    """The other fields; those that are refused may stand there with a value that asks nothing."""
    kept: dict[str, object] = {}
    for name, value in fields.items():
        if name not in refused:
            kept[name] = value
            continue
        neutral, why = refused[name]
        if value is not None and value not in neutral:
            path = f"{where}{name}"
            raise ApiError(400, f"{path} is not supported: {why}", param=path, code="unsupported")
    return kept


_Request = TypeVar("_Request", bound=BaseModel)


def _validate(kind: type[_Request], fields: Mapping[str, object]) -> _Request:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_context=False)
        # Each type that a field may have reports the same mistake.
        texts = {_path(mistake["loc"]): mistake for mistake in reversed(mistakes)}
        texts = {path: _text(path, mistake) for path, mistake in reversed(texts.items())}
        raise ApiError(400, "; ".join(texts.values()), param=next(iter(texts))) from error


def _path(location: tuple[int | str, ...]) -> str:
    """Where the mistake is; the names of types that were tried are left out."""
    names = [str(part) for part in location]
    return ".".join(name for name in names if name != "bool" and not name.startswith("literal["))


def _text(path: str, mistake: Mapping[str, Any]) -> str:
    if mistake["type"] == "extra_forbidden":
        return f"unknown field {path!r}; remove it"
    if mistake["type"] == "missing":
        return f"the field {path!r} is missing"
    message = mistake["msg"].removeprefix("Value error, ")
    return f"{path}: {message[0].lower()}{message[1:]}, got {mistake['input']!r:.80}"
