"""A routing strategy for LiteLLM's Router: it draws the expert of a request from the posterior of a served forest.

It has the two methods of LiteLLM's `CustomRoutingStrategyBase`, so LiteLLM need not be installed here.
`Router.register_plugin` (before, `set_custom_routing_strategy`) replaces the Router's own methods by them, and with
these what they do before they choose: aliases of model groups, ids of deployments, and deployments in cooldown are
considered here.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp

from btm_scale.errors import ConfigError
from btm_scale.serve.engine_answers import read_answer
from btm_scale.serve.hosts import authorization, proxy_of
from btm_scale.serve.shown import shown_failure, shown_url

Deployment = Mapping[str, Any]
_REMEDY = "Give the URL of `btm-scale serve`, up to /v1."


class _Router(Protocol):
    """What is used of LiteLLM's Router; aliases and cooldowns only if it has them."""

    model_list: Sequence[Any]


class PosteriorRouting:
    """Draws among the deployments whose `model_info` has `expert`; other requests get a random deployment.

    Drawing one expert for a request samples the forest exactly at temperature 1, as `btm-scale serve` does.
    """

    def __init__(
        self,
        url: str,
        router: _Router,
        *,
        api_key: str | None = None,
        chats: bool = True,
        seconds: float = 60.0,
        random_seed: int | None = None,
    ) -> None:
        """Route requests of a router.

        Args:
            url: of `btm-scale serve`, up to /v1.
            api_key: one of its keys; not with a user and password in the URL.
            chats: requests are chats, which become prompts by the forest's chat template. Otherwise their text is the
                prompt, as in `Router.text_completion`.
            seconds: to wait for the posterior.

        Raises ConfigError for a key or a proxy that no request can have.
        """
        if api_key is not None and urlsplit(url).username is not None:
            raise ConfigError(
                "A request has one Authorization. Set api_key, or a user and password in the URL, not both."
            )
        self._url, self._router, self._chats = f"{url.rstrip('/')}/posterior", router, chats
        self._shown, self._proxy = shown_url(self._url), proxy_of(self._url)
        self._headers = {} if api_key is None else authorization(api_key, "api_key")
        self._seconds = seconds
        self._random = random.Random(random_seed)

    def get_available_deployment(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]] | None = None,
        input: str | Sequence[Any] | None = None,
        specific_deployment: bool | None = False,
        request_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the deployment of the router that answers a request.

        Raises ConnectionError if the forest gives no posterior, and ValueError for a model without deployments.
        """
        candidates = self._candidates(model, bool(specific_deployment))
        if len(candidates) > 1 and (cooldowns := self._cooldowns("get_active_cooldowns", candidates)) is not None:
            candidates = _without(candidates, cooldowns)
        body = self._body(messages, input, request_kwargs) if _need_posterior(candidates) else None
        if body is None:
            return self._random.choice(candidates)
        with ThreadPoolExecutor(1) as thread:  # the caller's may have a running event loop
            posterior = thread.submit(asyncio.run, self._posterior(body)).result()
        return self._drawn(candidates, posterior)

    async def async_get_available_deployment(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]] | None = None,
        input: str | Sequence[Any] | None = None,
        specific_deployment: bool | None = False,
        request_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the same as `get_available_deployment`, without blocking the event loop."""
        candidates = self._candidates(model, bool(specific_deployment))
        if len(candidates) > 1 and (asked := self._cooldowns("async_get_active_cooldowns", candidates)) is not None:
            candidates = _without(candidates, await asked)
        body = self._body(messages, input, request_kwargs) if _need_posterior(candidates) else None
        if body is None:
            return self._random.choice(candidates)
        return self._drawn(candidates, await self._posterior(body))

    def _candidates(self, model: str, specific: bool) -> list[Any]:
        known = self._router.model_list
        if specific:
            found = [one for one in known if one["litellm_params"]["model"] == model]
        else:
            alias = (getattr(self._router, "model_group_alias", None) or {}).get(model, model)
            group = alias["model"] if isinstance(alias, Mapping) else alias
            found = [one for one in known if one["model_name"] == group] or [one for one in known if _id(one) == model]
        if not found:
            raise ValueError(f"No deployment in LiteLLM's model_list has the name '{model}'. Add one, or correct it.")
        return found

    def _cooldowns(self, method: str, candidates: Sequence[Deployment]) -> Any:
        """Return [(id, ...)] of the deployments that LiteLLM gives a rest, or a coroutine; None if it keeps none."""
        cache = getattr(self._router, "cooldown_cache", None)
        if cache is None:
            return None
        return getattr(cache, method)(model_ids=[_id(one) for one in candidates], parent_otel_span=None)

    def _body(
        self,
        messages: Sequence[Mapping[str, Any]] | None,
        text: Any,
        request_kwargs: Mapping[str, Any] | None,
    ) -> dict[str, Any] | None:
        if messages and self._chats:
            return {"messages": [{"role": one["role"], "content": one.get("content")} for one in messages]}
        if messages:
            return {"input": _prompt([one.get("content") for one in messages])}
        text = (request_kwargs or {}).get("input") if text is None else text
        return {"input": text} if isinstance(text, str) else None

    async def _posterior(self, body: Mapping[str, Any]) -> dict[str, float]:
        # A session per request: LiteLLM ends no strategy, so nothing would close one that is kept.
        session = aiohttp.ClientSession(headers=self._headers, timeout=aiohttp.ClientTimeout(total=self._seconds))
        try:
            async with session, session.post(self._url, json=body, proxy=self._proxy) as response:
                status, content = response.status, await read_answer(response, self._seconds)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ConnectionError(
                f"{self._shown} does not answer: {shown_failure(error)}. Check that the forest is served."
            ) from None
        except ValueError as error:
            raise ConnectionError(f"{self._shown} is not a forest: {error}. {_REMEDY}") from None
        text = content.decode(errors="replace")
        if status != 200:
            raise ConnectionError(f"{self._shown} answered with status {status}: {text[:300]}")
        try:
            return dict(json.loads(text)["posterior"])
        except (ValueError, LookupError, TypeError):
            raise ConnectionError(f"{self._shown} answered with no posterior. {_REMEDY}") from None

    def _drawn(self, candidates: Sequence[Any], posterior: Mapping[str, float]) -> Any:
        weights = [posterior.get(_expert(one), 0.0) for one in candidates]
        if not any(_expert(one) in posterior for one in candidates):
            raise ConnectionError(
                f"None of the experts {', '.join(map(str, posterior))} has a deployment. Set model_info.expert to them."
            )
        if not any(weights):  # those that could have answered have a cooldown
            weights = [float(_expert(one) in posterior) for one in candidates]
        deployments = Counter(map(_expert, candidates))  # the deployments of one expert share its weight
        shared = [weight / deployments[_expert(one)] for weight, one in zip(weights, candidates, strict=True)]
        return self._random.choices(candidates, shared)[0]


def _expert(deployment: Deployment) -> Any:
    return (deployment.get("model_info") or {}).get("expert")


def _id(deployment: Deployment) -> Any:
    return (deployment.get("model_info") or {}).get("id")


def _without(candidates: list[Any], cooldowns: Sequence[Sequence[Any]] | None) -> list[Any]:
    """Return the deployments that have no cooldown, or all if every one has: then the error comes from its engine."""
    resting = {one[0] for one in cooldowns or ()}
    return [one for one in candidates if _id(one) not in resting] or candidates


def _need_posterior(candidates: Sequence[Deployment]) -> bool:
    return len(candidates) > 1 and any(_expert(one) is not None for one in candidates)


def _prompt(contents: Sequence[Any]) -> str | list[int]:
    """Return the text of messages. `Router.text_completion` passes its prompt as the content of one.

    A prompt may be token ids, or a batch of prompts, of which one deployment answers all: the first counts.
    """
    (first, *others) = contents
    if not others and isinstance(first, list) and first:
        if isinstance(first[0], (list, str)):
            first = first[0]
        if isinstance(first, list) and all(type(one) is int for one in first):
            return first
    return "".join(_text(content) for content in (first, *others))


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or () if isinstance(part, Mapping))
