"""A run's method as an lm-evaluation-harness model; needs the package lm_eval (extra `lm-eval`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from btm_scale.config.section import bytes_from_text
from btm_scale.errors import UserError
from btm_scale.forest.open import open_folder
from btm_scale.generate.loglikelihood import generator_of_method, score_continuations, score_windows
from btm_scale.generate.sampling import Sampling

_MAX_TOKENS = 256


@register_model("btm-scale")
class ForestLM(TemplateLM):
    """`--model_args run=DIR,method=ensemble`, optionally domain=NAME and max_memory=8GB. Set `--device` as usual."""

    def __init__(
        self,
        run: str,
        method: str = "ensemble",
        domain: str | None = None,
        max_memory: str | None = None,
        batch_size: int | str = 8,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """Load a method by its name in results.json. Raises `UserError` for an unknown run or method."""
        super().__init__()
        config, directory = open_folder(Path(run))
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size is '{batch_size}'. It must be a positive integer; 'auto' is not supported.")
        self.generator = generator_of_method(
            config,
            directory,
            method,
            domain=domain,
            max_bytes=bytes_from_text(str(max_memory)) if max_memory else None,
            device=device,
        )
        self._batch = int(batch_size)
        self._random_seeds = count()  # one per text: the harness repeats a request to get different samples

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token."""
        return self.generator.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """The token before the text of a document: BOS with `tokenizer.bos`, else the end-of-document token."""
        return self.generator.tokenizer.start

    @property
    def tokenizer_name(self) -> str:
        """A hash of the tokenizer, for the harness's caches."""
        return self.generator.tokenizer.digest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text, without special tokens."""
        return self.generator.tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # The experts' documents begin after this token.
        before, after = super()._encode_pair(context, continuation)
        return [self.prefix_token_id, *before], after

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = []
        for batch in self._batches(requests, disable_tqdm):
            scored = score_continuations(self.generator, [(context, text) for _, context, text in batch])
            for (request, _, _), answer in zip(batch, scored, strict=True):
                if request is not None:
                    self.cache_hook.add_partial("loglikelihood", request, answer)
            results += scored
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probabilities of complete texts in nats, in windows that do not overlap."""
        windows: list[tuple[list[int], int]] = []
        owners: list[int] = []
        for number, (text,) in enumerate(request.args for request in requests):
            pairs = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.generator.context, context_len=1
            )
            for before, after in map(make_disjoint_window, pairs):
                windows.append(([*before, *after], len(after)))
                owners.append(number)
        totals = [0.0] * len(requests)
        window = 0
        for batch in self._batches(windows, disable_tqdm):
            for total in score_windows(self.generator, batch):
                totals[owners[window]] += total
                window += 1
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop string, greedily unless `do_sample` or a temperature is set.

        Every text has its own random seed: requests that repeat are sampled anew, and the same sequence of requests
        gives the same texts.
        """
        texts = []
        for context, arguments in tqdm([request.args for request in requests], disable=disable_tqdm):
            until = arguments.get("until") or []
            max_tokens = int(arguments.get("max_gen_toks", _MAX_TOKENS))
            self.generator.sampling = _sampling(arguments)
            (generation,) = self.generator.generate(
                [self._last_part(context, max_tokens)],
                max_tokens=max_tokens,
                stop=[until] if isinstance(until, str) else until,
                random_seed=next(self._random_seeds),
            )
            self.cache_hook.add_partial("generate_until", (context, arguments), generation.text)
            texts.append(generation.text)
        return texts

    def _last_part(self, context: str, max_tokens: int) -> str:
        """Return the end of a context that leaves room for `max_tokens`, but at least half of the model's context."""
        room = max(self.generator.context - max_tokens, self.generator.context // 2)
        while len(ids := self.tok_encode(context)) > room:
            # Encoding the decoded part again can give more ids, so truncate until it fits.
            context = self.generator.tokenizer.decode(ids[-room:])[1:]
        return context

    def _batches(self, items: Sequence[Any], disable_tqdm: bool) -> Iterator[Sequence[Any]]:
        with tqdm(total=len(items), disable=disable_tqdm) as bar:
            for first in range(0, len(items), self._batch):
                batch = items[first : first + self._batch]
                yield batch
                bar.update(len(batch))


def _sampling(arguments: dict[str, Any]) -> Sampling:
    if not arguments.get("do_sample", float(arguments.get("temperature", 0) or 0) > 0):
        return Sampling(temperature=0)
    top_k, top_p = arguments.get("top_k"), arguments.get("top_p")
    return Sampling(float(arguments.get("temperature", 1.0)), top_k and int(top_k), top_p and float(top_p))
