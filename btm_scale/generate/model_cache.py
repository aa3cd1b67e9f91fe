"""An LRU cache of a forest's models under a memory limit, and the context length that they share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import CheckpointError, ForestError, UserError
from btm_scale.generate.together import Together
from btm_scale.model.hf_decoder import Decoder, limits_of


def shared_context(models: Mapping[str, Path], tokenizer: Tokenizer) -> int:
    """Return the longest sequence in tokens that every model can read.

    Raises `ForestError` if there is no model, or if a model's vocabulary is smaller than the tokenizer's.
    """
    if not models:
        raise ForestError("There is no model to generate from. Train experts first: btm-scale run CONFIG.")
    contexts = []
    for name, directory in models.items():
        with _reading(name, directory):
            positions, rows = limits_of(directory)
        if rows < tokenizer.vocab_size:
            raise ForestError(
                f"'{name}' has a vocabulary of {rows} tokens, but the run's tokenizer has {tokenizer.vocab_size}. It "
                "was trained with a different tokenizer: leave it out."
            )
        contexts.append(positions)
    return min(contexts)


class Shelf:
    """An LRU cache of loaded models by name, each alone or in a stack with others."""

    def __init__(
        self,
        directories: Mapping[str, Path],
        *,
        vocabulary: int | None = None,
        max_bytes: float | None = None,
        device: str = "cpu",
    ) -> None:
        """Limit the weights in memory, without KV caches, to `max_bytes`. Raises `UserError` if a model is larger."""
        self._directories = dict(directories)
        self._sizes = {}
        for name, directory in directories.items():
            with _reading(name, directory):
                self._sizes[name] = weight_bytes(directory)
        self._max_bytes = max_bytes
        self._vocabulary = vocabulary
        self._device = device
        self._loaded: dict[str, Decoder] = {}
        self._stacked: tuple[tuple[str, ...], Together] | None = None
        largest = max(self._sizes, key=self._sizes.__getitem__)
        if max_bytes is not None and self._sizes[largest] > max_bytes:
            raise UserError(
                f"'{largest}' has {_gigabytes(self._sizes[largest])} of weights, but --max-memory is "
                f"{_gigabytes(max_bytes)}. Increase --max-memory."
            )

    def take(self, name: str) -> Decoder:
        """Return a model, loading it if needed."""
        decoder = self._loaded.pop(name, None)
        if decoder is None:
            self._make_room(self._sizes[name])
            directory = self._directories[name]
            with _reading(name, directory):
                decoder = Decoder.load(directory, vocabulary=self._vocabulary, device=self._device)
        self._loaded[name] = decoder
        return decoder

    def take_all(self, names: Sequence[str], why: str) -> list[Decoder]:
        """Return several models at once. Raises `UserError`, naming `why`, if they exceed the limit."""
        needed = sum(self._sizes[name] for name in names)
        if self._max_bytes is not None and needed > self._max_bytes:
            raise UserError(
                f"{why} needs all {len(names)} experts in memory, {_gigabytes(needed)} of weights, but --max-memory is "
                f"{_gigabytes(self._max_bytes)}. Increase --max-memory, use fewer experts, or use method 'expert', "
                "which holds one at a time."
            )
        return [self.take(name) for name in names]

    def take_together(self, names: Sequence[str], why: str) -> Together:
        """Return several models that read the same texts, alike ones stacked. Raises `UserError` as `take_all`.

        A stack takes no memory besides that of its models. There is one at a time.
        """
        decoders = self.take_all(names, why)
        if len(decoders) == 1:
            return Together(decoders)
        if self._stacked is not None:
            if self._stacked[0] == tuple(names):
                return self._stacked[1]
            self._unstack()
        self._stacked = (tuple(names), Together(decoders))
        return self._stacked[1]

    def fit(self, names: Iterable[str]) -> bool:
        """Return whether these models fit into memory together."""
        return self._max_bytes is None or sum(self._sizes[name] for name in set(names)) <= self._max_bytes

    def spare(self, names: Iterable[str]) -> float:
        """Return how many bytes of the limit are left beside the loaded models and these; infinite without a limit."""
        if self._max_bytes is None:
            return float("inf")
        return self._max_bytes - sum(self._sizes[name] for name in {*self._loaded, *names})

    @property
    def loaded(self) -> list[str]:
        """Names of the models in memory, least recently used first."""
        return list(self._loaded)

    def _make_room(self, size: int) -> None:
        while self._loaded and self._max_bytes is not None:
            if size + sum(self._sizes[name] for name in self._loaded) <= self._max_bytes:
                return
            oldest = next(iter(self._loaded))
            del self._loaded[oldest]
            if self._stacked is not None and oldest in self._stacked[0]:
                self._unstack()

    def _unstack(self) -> None:
        """Free the stack: models that stay loaded get their own weights again."""
        assert self._stacked is not None
        together, self._stacked = self._stacked[1], None
        together.unstack(list(self._loaded.values()))


@contextmanager
def _reading(name: str, directory: Path) -> Iterator[None]:
    """Raise `ForestError` if the files of a model disappear while they are read: `forest remove` does not wait."""
    try:
        yield
    except (FileNotFoundError, CheckpointError) as error:
        if isinstance(error, CheckpointError) and directory.is_dir():
            raise
        raise ForestError(
            f"'{name}' was removed while it was loaded: {directory} is gone. Only models that stay in the run can "
            "generate text. Repeat the command to use those that are left."
        ) from None


def weight_bytes(directory: Path) -> int:
    """Return the size in bytes of a Hugging Face directory's weights. Raises `CheckpointError` if it has none."""
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    if size == 0:
        raise CheckpointError(f"{directory} is not a model: it has no .safetensors. Train it, or choose another model.")
    return size


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
