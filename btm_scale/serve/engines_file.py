"""The file of `serve --backend`: where each expert is served."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from btm_scale.config.yaml import load_yaml
from btm_scale.errors import ConfigError, unknown_name
from btm_scale.serve.hosts import authorization, proxy_of


def _with_host(url: str) -> str:
    parts = urlsplit(url)
    if not parts.hostname or parts.port == 0:  # an invalid port is a ValueError
        raise ValueError("A URL needs a host, and its port is not 0")
    return url


_Url = Annotated[str, Field(pattern=r"^https?://[^\s]+$"), AfterValidator(_with_host)]


class RemoteExpert(BaseModel):
    """An expert behind an OpenAI-compatible engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: _Url  # up to /v1
    model: str | None = None  # its name there. Default: the expert's
    api_key_variable: str | None = None  # an environment variable; not with a user and password in the URL
    score: Path | None = None  # weights that score prompts here; relative to the file. Default: the engine scores

    @model_validator(mode="after")
    def _with_one_authorization(self) -> RemoteExpert:
        if self.api_key_variable is not None and urlsplit(self.url).username is not None:
            raise ValueError("Set api_key_variable, or a user and password in the URL, not both")
        return self

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request. Raises ConfigError if the environment variable has no API key."""
        if self.api_key_variable is None:
            return {}
        key = os.environ.get(self.api_key_variable, "")
        return authorization(key, f"The environment variable {self.api_key_variable}")


def load_engines(path: Path, experts: Sequence[str]) -> dict[str, RemoteExpert]:
    """Return where experts are served, by name: a URL, or the fields of RemoteExpert.

    Raises ConfigError if the file cannot be read, is invalid or names an expert that the forest lacks.
    """
    values = load_yaml(path)
    if not values:
        raise ConfigError(f"{path} names no expert. Write one line per expert, such as law: http://host:8001/v1")
    for name in values:
        if name not in experts:
            raise ConfigError(f"{path}: {unknown_name('expert', str(name), experts)}")
    full = {name: {"url": value} if isinstance(value, str) else value for name, value in values.items()}
    try:
        engines = TypeAdapter(dict[str, RemoteExpert]).validate_python(full)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}: {where}: {message}. Correct it.") from None
    for engine in engines.values():
        _ = engine.headers, proxy_of(engine.url)  # that the keys are set, and the proxies can be used
    return {
        name: engine.model_copy(update={"score": path.parent / engine.score}) if engine.score else engine
        for name, engine in engines.items()
    }
