"""From a request to jobs: prompts are encoded, limits checked, and the model that answers is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import DataError, UserError
from btm_scale.generate.sampling import Sampling
from btm_scale.serve.api_errors import ApiError
from btm_scale.serve.catalog import FOREST, Catalog
from btm_scale.serve.chat import ChatTemplate, no_template
from btm_scale.serve.schemas import ChatRequest, CompletionRequest, Message, PosteriorRequest
from btm_scale.serve.work import Backend, Job

# A temperature below this is greedy: logits divided by it would overflow.
_SMALLEST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Planner:
    """What requests are checked against."""

    catalog: Catalog
    backend: Backend
    tokenizer: Tokenizer
    chat: ChatTemplate | None

    def completion(self, request: CompletionRequest) -> list[Job]:
        """Return a job per prompt. Raises ApiError."""
        sampling = _sampling(request)
        score_prompt = request.echo and request.logprobs is not None
        names, method = self.catalog.choose(request.model, sampling, self.backend, mixed=score_prompt)
        if request.n * len(request.prompts) > self.backend.max_copies:
            raise _too_many(request.n, len(request.prompts), self.backend.max_copies)
        prompts = self._prompts(request.prompts)
        return [
            Job(
                prompt,
                names,
                method,
                request.n,
                request.max_tokens,
                sampling,
                request.stops,
                _seed(request.seed, number),
                request.logprobs,
                score_prompt,
                starts_document=self._starts_document(given),
                stream=request.stream,
            )
            for number, (prompt, given) in enumerate(zip(prompts, request.prompts, strict=True))
        ]

    def chat_completion(self, request: ChatRequest) -> list[Job]:
        """Return the job of a chat. Raises ApiError."""
        sampling = _sampling(request)
        names, method = self.catalog.choose(request.model, sampling, self.backend)
        prompt = self._chat_prompt(request.messages)
        if request.n > self.backend.max_copies:
            raise _too_many(request.n, 1, self.backend.max_copies)
        limit = request.max_completion_tokens or request.max_tokens or self.backend.context
        top = request.top_logprobs if request.logprobs else None
        seed = _seed(request.seed, 0)
        stops = request.stops + (self.chat.stops if self.chat is not None else ())
        return [Job(prompt, names, method, request.n, limit, sampling, stops, seed, top, stream=request.stream)]

    def posterior(self, request: PosteriorRequest) -> Job:
        """Return the job that scores a text or chat and continues nothing. Raises ApiError."""
        names, _ = self.catalog.choose(FOREST, Sampling(), self.backend)
        if request.messages is not None:
            return Job(self._chat_prompt(request.messages), names, copies=0, trace=request.trace)
        (prompt,) = self._prompts([request.input])  # type: ignore[arg-type]
        return Job(prompt, names, copies=0, trace=request.trace, starts_document=self._starts_document(request.input))

    def _chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        if self.chat is None:
            raise no_template()
        text = self.chat.render(messages)
        try:
            encoded = self.tokenizer.encode_special(text)
        except DataError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_prompt") from None
        (prompt,) = self._checked([encoded])
        return prompt

    def _starts_document(self, given: object) -> bool:
        return isinstance(given, list) and given[:1] == [self.tokenizer.start]

    def _prompts(self, given: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
        if not given:
            raise ApiError(400, "'prompt' is an empty list. Send at least one prompt.", param="prompt")
        if isinstance(given[0], str):
            try:
                encoded = [ids.tolist() for ids in self.tokenizer.encode_batch(given)]  # type: ignore[arg-type]
            except DataError as error:
                raise ApiError(400, str(error), param="prompt", code="invalid_prompt") from None
        else:
            encoded = [self._known(list(ids)) for ids in given]  # type: ignore[arg-type]
        return self._checked(encoded)

    def _known(self, ids: list[int]) -> list[int]:
        size = self.tokenizer.vocab_size
        if any(not 0 <= token < size for token in ids):
            raise ApiError(
                400, f"A token id is not in the vocabulary of {size:,} tokens. Use the run's tokenizer.", param="prompt"
            )
        return ids

    def _checked(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Return prompts that begin with the start of the document, and fit into the context."""
        start = self.tokenizer.start
        complete = [ids if ids[:1] == [start] else [start, *ids] for ids in prompts]
        for ids in complete:
            if len(ids) > self.backend.context:
                raise ApiError(
                    400,
                    f"The maximum context length is {self.backend.context} tokens, but the prompt has {len(ids)}, "
                    "including the start of the document. Shorten it.",
                    param="prompt",
                    code="context_length_exceeded",
                )
        return complete


def _sampling(request: CompletionRequest | ChatRequest) -> Sampling:
    temperature = 0.0 if request.temperature < _SMALLEST_TEMPERATURE else request.temperature
    top_p = request.top_p if request.top_p < 1 else None
    try:
        return Sampling(temperature, request.top_k if request.top_k > 0 else None, top_p)
    except UserError as error:
        raise ApiError(400, str(error), param="temperature") from None


def _seed(seed: int | None, number: int) -> int | None:
    """Return the non-negative seed of prompt `number`."""
    return None if seed is None else ((seed % (1 << 64)) << 16) + number


def _too_many(n: int, prompts: int, most: int) -> ApiError:
    what = f"n is {n}" if prompts == 1 else f"{prompts} prompts with n={n} are {prompts * n} texts"
    param = "n" if n > 1 else "prompt"
    return ApiError(400, f"{what}. A request may ask for at most {most} texts.", param=param, code="too_many_choices")
