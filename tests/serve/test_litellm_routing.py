"""The routing strategy for LiteLLM: its documented interface, and draws from the posterior."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from helpers.raw_engine import OK, Listener
from helpers.served_forest import Served

from btm_scale.errors import ConfigError
from btm_scale.serve.litellm_routing import PosteriorRouting

METHODS = ("get_available_deployment", "async_get_available_deployment")


def deployment(group: str, model: str, expert: str | None = None) -> dict[str, Any]:
    return {
        "model_name": group,
        "litellm_params": {"model": f"hosted_vllm/{model}", "api_base": "http://gpu:8001/v1"},
        "model_info": {"id": model, **({"expert": expert} if expert else {})},
    }


@dataclass
class Cooldowns:
    """LiteLLM's `CooldownCache`: the deployments that failed a short time ago."""

    ids: set[str] = field(default_factory=set)

    def get_active_cooldowns(self, model_ids: list[str], parent_otel_span: Any) -> list[tuple[str, dict[str, Any]]]:
        return [(one, {"status_code": "429", "cooldown_time": 5.0}) for one in model_ids if one in self.ids]

    async def async_get_active_cooldowns(
        self, model_ids: list[str], parent_otel_span: Any
    ) -> list[tuple[str, dict[str, Any]]]:
        return self.get_active_cooldowns(model_ids, parent_otel_span)


@dataclass
class Router:
    """What LiteLLM's Router has and does around a strategy: `register_plugin` replaces two methods."""

    model_list: list[dict[str, Any]] = field(
        default_factory=lambda: [
            deployment("forest", "a", "expert0"),
            deployment("forest", "b", "expert1"),
            deployment("forest", "b2", "expert1"),
            deployment("other", "c"),
        ]
    )
    model_group_alias: dict[str, Any] = field(
        default_factory=lambda: {"gpt-4": "forest", "hidden": {"model": "other", "hidden": True}}
    )
    cooldown_cache: Cooldowns = field(default_factory=Cooldowns)

    def register_plugin(self, strategy: Any) -> None:
        for name in METHODS:
            setattr(self, name, getattr(strategy, name))

    set_custom_routing_strategy = register_plugin  # its name in earlier versions

    def ask(self, times: int, **request: Any) -> Counter[str]:
        async def several() -> list[Any]:
            return [await self.async_get_available_deployment(**request) for _ in range(times)]  # type: ignore[attr-defined]

        found = asyncio.run(several())
        found += [self.get_available_deployment(**request) for _ in range(times)]  # type: ignore[attr-defined]
        assert all(one in self.model_list for one in found)
        return Counter(one["model_info"]["id"] for one in found)


@pytest.fixture
def router(served: Served) -> Router:
    router = Router()
    router.register_plugin(PosteriorRouting(f"{served.url}/v1", router, random_seed=1))
    return router


@pytest.fixture
def forest_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """A proxy for https, whose password is "secret"; it refuses two requests."""
    for name in ("https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Listener(*[b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n"] * 2) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:secret@{proxy.address}")
        yield proxy


def test_the_methods_take_what_litellm_passes() -> None:
    for name in METHODS:
        parameters = list(inspect.signature(getattr(PosteriorRouting, name)).parameters)[1:]
        assert parameters == ["model", "messages", "input", "specific_deployment", "request_kwargs"]
    assert inspect.iscoroutinefunction(PosteriorRouting.async_get_available_deployment)


def test_a_chat_goes_to_an_expert_drawn_from_its_posterior(router: Router, served: Served) -> None:
    messages = [{"role": "user", "content": "ab"}]
    posterior = served.post("/v1/posterior", {"messages": messages}).json()["posterior"]
    drawn = router.ask(40, model="forest", messages=messages, request_kwargs={})
    spread = (80 * posterior["expert0"] * posterior["expert1"]) ** 0.5
    assert abs(drawn["a"] - 80 * posterior["expert0"]) < 4 * spread
    assert drawn["b"] > 0
    assert drawn["b2"] > 0
    assert router.ask(5, model="hosted_vllm/b2", messages=messages, specific_deployment=True) == {"b2": 10}


def test_without_chats_the_text_of_messages_is_the_prompt(served: Served) -> None:
    router = Router()
    seen: list[Any] = []
    strategy = PosteriorRouting(f"{served.url}/v1", router, chats=False)
    body = strategy._body
    strategy._body = lambda *given: seen.append(body(*given)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    router.set_custom_routing_strategy(strategy)
    parts = [{"type": "text", "text": "cd"}]
    # `Router.text_completion` passes its prompt as the content of one message, whatever the prompt is.
    for contents, expected in (
        (["ab", parts], "abcd"),
        (["abd"], "abd"),
        ([["ab", "cd"]], "ab"),
        ([[1, 2]], [1, 2]),
        ([[[3], [1, 2]]], [3]),
        ([parts], "cd"),
        ([None], ""),
    ):
        seen.clear()
        router.ask(1, model="forest", messages=[{"role": "user", "content": content} for content in contents])
        assert seen == [{"input": expected}] * 2
    seen.clear()
    router.ask(1, model="forest", request_kwargs={"input": "ab"})  # as for the Responses API
    assert seen == [{"input": "ab"}] * 2


def test_other_models_are_not_scored_and_unknown_ones_are_refused(router: Router) -> None:
    assert router.ask(2, model="other", messages=[{"role": "tool", "content": "x"}]) == {"c": 4}
    with pytest.raises(ValueError, match=r"No deployment .* has the name 'none'"):
        router.ask(1, model="none")


def test_aliases_and_ids_of_deployments_are_known_as_they_are_to_litellm(router: Router) -> None:
    messages = [{"role": "user", "content": "ab"}]
    assert set(router.ask(10, model="gpt-4", messages=messages)) <= {"a", "b", "b2"}
    assert router.ask(1, model="hidden", messages=messages) == {"c": 2}
    assert router.ask(2, model="b2", messages=messages) == {"b2": 4}


def test_deployments_in_cooldown_are_left_out_of_the_posterior(router: Router) -> None:
    messages = [{"role": "user", "content": "ab"}]
    router.cooldown_cache.ids = {"a", "b"}
    assert router.ask(5, model="forest", messages=messages) == {"b2": 10}
    router.cooldown_cache.ids = {"a", "b", "b2"}
    assert len(router.ask(20, model="forest", messages=messages)) > 1


def test_a_posterior_that_cannot_be_had_is_an_error(router: Router) -> None:
    with pytest.raises(ConnectionError, match=r"status 400: .*refuses these messages: no tools"):
        router.ask(1, model="forest", messages=[{"role": "tool", "content": "x"}])
    router.model_list = [deployment("forest", name, f"unknown-{name}") for name in "ab"]
    with pytest.raises(ConnectionError, match="None of the experts expert0, expert1 has a deployment"):
        router.ask(1, model="forest", messages=[{"role": "user", "content": "a"}])
    router.register_plugin(PosteriorRouting("http://me:secret@127.0.0.1:9/v1", router))
    with pytest.raises(ConnectionError, match=r"^127\.0\.0\.1:9/v1/posterior does not answer"):
        router.ask(1, model="forest", messages=[{"role": "user", "content": "a"}])


def test_a_url_of_another_server_is_an_error(router: Router) -> None:
    with Listener(*[OK] * 2) as other:
        router.register_plugin(PosteriorRouting(f"http://{other.address}/v1", router))
        ask = {"model": "forest", "messages": [{"role": "user", "content": "a"}]}
        with pytest.raises(ConnectionError, match="answered with no posterior"):
            router.get_available_deployment(**ask)  # type: ignore[attr-defined]
        with pytest.raises(ConnectionError, match="answered with no posterior"):
            asyncio.run(router.async_get_available_deployment(**ask))  # type: ignore[attr-defined]
        assert len(other.heads) == 2


def test_errors_name_no_password(forest_proxy: Listener) -> None:
    router = Router()
    router.register_plugin(PosteriorRouting("https://me:canary@forest.example/v1", router))
    ask = {"model": "forest", "messages": [{"role": "user", "content": "a"}]}
    for _ in range(2):
        with pytest.raises(ConnectionError, match=r"^forest\.example/v1/posterior does not .* status 407") as raised:
            router.get_available_deployment(**ask)  # type: ignore[attr-defined]
        assert not any(word in str(raised.value) for word in ("secret", "canary"))
    assert forest_proxy.heads[0].startswith(b"CONNECT forest.example:443 ")


@pytest.mark.parametrize(
    ("url", "key", "reason"),
    [
        ("http://me:canary@forest.example/v1", "abc", "Set api_key, or a user and password in the URL, not both"),
        ("http://forest.example/v1", "canary\nX-Other: 1", "api_key has characters that no HTTP header may have"),
        ("http://forest.example/v1", "", "api_key is not set"),
        ("https://forest.example/v1", "abc", "a socks5 proxy for forest.example"),
    ],
    ids=["both", "characters", "empty", "socks"],
)
def test_a_key_or_proxy_that_no_request_can_have_is_refused_at_the_start(
    url: str, key: str, reason: str, forest_proxy: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://me:canary@proxy:1080")
    with pytest.raises(ConfigError, match=reason) as raised:
        PosteriorRouting(url, Router(), api_key=key)
    assert "canary" not in str(raised.value)


def test_a_key_is_sent_without_the_end_of_its_line() -> None:
    router = Router()
    with Listener(OK) as other:
        router.register_plugin(PosteriorRouting(f"http://{other.address}/v1", router, api_key="abc\n"))
        with pytest.raises(ConnectionError, match="answered with no posterior"):
            router.get_available_deployment(model="forest", messages=[{"role": "user", "content": "a"}])  # type: ignore[attr-defined]
        assert b"Authorization: Bearer abc" in other.heads[0].split(b"\r\n")
