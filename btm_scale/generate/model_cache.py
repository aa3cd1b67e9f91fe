"""The models of a forest as they are needed: what all can read, and as many in memory as a limit lets in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import CheckpointError, ForestError, UserError
from btm_scale.model.hf_decoder import Decoder, limits_of


def shared_context(models: Mapping[str, Path], tokenizer: Tokenizer) -> int:
    """The longest text in tokens that every model can read.

    Raises ForestError if there is no model, or one of another vocabulary than the tokenizer's.
    """
    if not models:
        raise ForestError("no model to generate from; train experts first: btm-scale run CONFIG")
    contexts = []
    for name, directory in models.items():
        positions, rows = limits_of(directory)
        if rows < tokenizer.vocab_size:
            raise ForestError(
                f"'{name}' has a vocabulary of {rows} tokens, and the run's tokenizer has {tokenizer.vocab_size}; "
                "it was made with another tokenizer: leave it out"
            )
        contexts.append(positions)
    return min(contexts)


class Shelf:
    """Models by name; those that were used longest ago make room for others."""

    def __init__(
        self,
        directories: Mapping[str, Path],
        *,
        vocabulary: int | None = None,
        max_bytes: float | None = None,
        device: str = "cpu",
    ) -> None:
        """`max_bytes`: of weights in memory at once; caches come on top. Raises UserError if a model has more."""
        self._directories = dict(directories)
        self._sizes = {name: weight_bytes(directory) for name, directory in directories.items()}
        self._max_bytes = max_bytes
        self._vocabulary = vocabulary
        self._device = device
        self._loaded: dict[str, Decoder] = {}
        largest = max(self._sizes, key=self._sizes.__getitem__)
        if max_bytes is not None and self._sizes[largest] > max_bytes:
            raise UserError(
                f"'{largest}' has {_gigabytes(self._sizes[largest])} of weights, and at most {_gigabytes(max_bytes)} "
                "may be in memory; raise --max-memory"
            )

    def take(self, name: str) -> Decoder:
        """One model, loaded if it isn't there."""
        decoder = self._loaded.pop(name, None)
        if decoder is None:
            self._make_room(self._sizes[name])
            decoder = Decoder.load(self._directories[name], vocabulary=self._vocabulary, device=self._device)
        self._loaded[name] = decoder
        return decoder

    def take_all(self, names: Sequence[str], why: str) -> list[Decoder]:
        """Several models at once. Raises UserError, with `why` they are needed, if the limit doesn't let them in."""
        needed = sum(self._sizes[name] for name in names)
        if self._max_bytes is not None and needed > self._max_bytes:
            raise UserError(
                f"{why} needs all {len(names)} experts in memory, {_gigabytes(needed)} of weights, and at most "
                f"{_gigabytes(self._max_bytes)} may be; use the method 'expert', which holds one at a time, fewer "
                "experts, or raise --max-memory"
            )
        return [self.take(name) for name in names]

    @property
    def loaded(self) -> list[str]:
        """The names of the models in memory, the one that was used longest ago first."""
        return list(self._loaded)

    def _make_room(self, size: int) -> None:
        while self._loaded and self._max_bytes is not None:
            if size + sum(self._sizes[name] for name in self._loaded) <= self._max_bytes:
                return
            del self._loaded[next(iter(self._loaded))]


def weight_bytes(directory: Path) -> int:
    """Bytes of a Hugging Face directory's weights. Raises CheckpointError if it has none."""
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    if size == 0:
        raise CheckpointError(f"no model in {directory}: it has no .safetensors; train it, or name another")
    return size


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
