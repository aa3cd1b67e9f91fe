"""The requests of OpenAI's API that are understood, and which of its other parameters may be ignored."""

from __future__ import annotations

import codecs
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from btm_scale.errors import near_match
from btm_scale.serve.api_errors import ApiError
from btm_scale.util.bounded_json import parse_json

MAX_ALTERNATIVES = 20
_MOST_TEXTS = 1 << 20  # above any server's limit; more may have too many digits to be printed
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]

# Parameters without influence on the text.
_HARMLESS = (
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
    *("cache_prompt", "cache_salt", "id_slot", "priority", "request_id"),
)
# Parameters that are accepted only with a value that changes nothing, as front ends send them for every sampler that
# they know.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "min_p": (0,),
    "min_tokens": (0,),
    "typical_p": (1,),
    "tfs": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "dynatemp_range": (0,),
    "dynamic_temperature": (False,),
    "smoothing_factor": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "no_repeat_ngram_size": (0,),
    "ignore_eos": (False,),
    "ban_eos_token": (False,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "do_sample": (True,),
    "num_beams": (1,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "bad_words": ([],),
    "grammar": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}

Request = TypeVar("Request", bound="_Body")


class _Body(BaseModel):
    """A JSON body; parameters that are not fields are checked by `_require_harmless`."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """Clients send null for what they leave out."""
        return {name: value for name, value in values.items() if value is not None} if type(values) is dict else values


class StreamOptions(_Body):
    """What a stream has besides text."""

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against observers of the network, which is not added


class _Generation(_Body):
    """What both kinds of completions have in common."""

    model: str = Field(max_length=500)
    n: int = Field(default=1, ge=1, le=_MOST_TEXTS)
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, description="0 and -1 keep all tokens, as in vLLM")
    stop: _Stop | Annotated[list[_Stop], Field(max_length=64)] = Field(default_factory=list)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(_Generation):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    echo: bool = False

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Every prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A message of a chat."""

    role: str
    content: str | list[TextPart] = ""

    @model_validator(mode="after")
    def _is_text(self) -> Message:
        lost = [name for name in ("tool_calls", "function_call", "audio") if (self.model_extra or {}).get(name)]
        if lost:
            raise ValueError(f"'{lost[0]}' is not supported, and would be lost. Leave the message out")
        return self

    @property
    def text(self) -> str:
        """The content."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Generation):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_ALTERNATIVES)

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class PosteriorRequest(_Body):
    """The body of /v1/posterior."""

    input: str | list[int] | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    trace: bool = False

    @model_validator(mode="after")
    def _one_text(self) -> PosteriorRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("Send either 'input' or 'messages'")
        return self


def parsed(kind: type[Request], body: bytes) -> Request:
    """Return a request. Raises ApiError if it is invalid, or has a parameter that would change the result."""
    try:
        values = parse_json(body.removeprefix(codecs.BOM_UTF8))  # which some clients on Windows send
    except ValueError as error:
        raise ApiError(400, f"The body is {error}. Send a JSON object.", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "The body is not a JSON object. Send one.", code="invalid_json")
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from None
    _require_harmless(request)
    return request


def _refusal(error: ValidationError) -> ApiError:
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    first = max((one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]), key=_likeness)
    path = [str(part) for part in first["loc"] if not str(part).startswith(("list[", "constrained-", "function-"))]
    if len(path) > 1 and path[-1] in ("str", "int", "float"):  # a member of a union
        path.pop()
    missing = first["type"] == "missing"
    where = ".".join(path)
    reason = first["msg"].removeprefix("Value error, ")  # which pydantic puts before the messages of our validators
    message = f"Missing required parameter: '{where}'." if missing else f"Invalid value for '{where}': {reason}."
    return ApiError(
        400,
        message if where else f"{reason}.",
        param=path[0] if path else None,
        code="missing_required_parameter" if missing else "invalid_value",
    )


def _likeness(error: Any) -> tuple[int, bool]:
    """Return how much a value resembles the member of a union that refuses it: every member has an error."""
    return len(error["loc"]), not error["type"].endswith("_type")


def _require_harmless(request: _Body) -> None:
    for name, value in (request.model_extra or {}).items():
        if name in _HARMLESS or (name == "best_of" and value == getattr(request, "n", 1)):
            continue
        if name not in _NEUTRAL:
            known = [*type(request).model_fields, *_NEUTRAL, *_HARMLESS]
            raise ApiError(
                400,
                f"Unknown parameter: '{name:.80}'.{near_match(name[:80], known)}",
                param=name[:80],
                code="unknown_parameter",
            )
        if value not in _NEUTRAL[name]:
            raise ApiError(
                400,
                f"'{name}' is not supported, and would change the result. Leave it out.",
                param=name,
                code="unsupported_parameter",
            )
