"""Whether every split of a domain has enough text, and settings with which it has, for the message if it has not."""

from __future__ import annotations

import math
from collections.abc import Mapping

from btm_scale.config.run import RunConfig
from btm_scale.data.fingerprint import SplitCounts
from btm_scale.data.sources import DomainSource
from btm_scale.errors import DataError
from btm_scale.run_dir import SPLITS

_SHORTEST_SEQUENCE = 8
_MARGIN = 1.3  # tokens are not spread evenly over a text


def needed_splits(source: DomainSource, config: RunConfig) -> tuple[str, ...]:
    """Return the splits that a run uses: a novel domain is only scored."""
    return tuple(SPLITS) if source.name in config.expert_domains else ("dev", "test")


def require_enough(source: DomainSource, config: RunConfig, counts: Mapping[str, SplitCounts]) -> None:
    """Raise DataError unless every split that is used fills at least one sequence."""
    needed = config.budget.sequence_length + 1
    splits = needed_splits(source, config)
    if all(counts[split].tokens >= needed for split in splits):
        return
    sizes = ", ".join(
        f"{split} has {counts[split].documents} documents with {counts[split].tokens} tokens" for split in splits
    )
    tokens = sum(count.tokens for count in counts.values())
    raise too_small(source, config, sizes, tokens, elsewhere=" and a new --out")


def too_small(source: DomainSource, config: RunConfig, sizes: str, tokens: float, *, elsewhere: str = "") -> DataError:
    """Return the error for a domain of `tokens` with a split that fills no sequence; `sizes` describes its splits.

    The message has settings with which the same text is enough, if there are any.
    """
    needed = config.budget.sequence_length + 1
    remedy = "Add text."
    if source.settings.chat is None and (settings := _settings_that_suffice(source, config, tokens)):
        remedy = f"Add text, or run with `{' '.join(f'--set {setting}' for setting in settings)}`{elsewhere}."
    if source.is_grouped:
        remedy += " Its documents are split by file or field: smaller units, or split_by: document, are more even."
    return DataError(
        f"Domain '{source.name}' is too small to split: {sizes}. Each needs at least {needed} tokens "
        f"(budget.sequence_length + 1). {remedy}"
    )


def _settings_that_suffice(source: DomainSource, config: RunConfig, tokens: float) -> list[str]:
    """Return settings that split the text by position, with larger parts or shorter sequences if those are needed."""
    data, needed = config.data, config.budget.sequence_length + 1
    section = next(
        name for name in ("domains", "added_domains", "novel_domains") if source.name in getattr(config, name)
    )
    settings = []
    if source.settings.split_by != "position":
        settings.append(f"{section}.{source.name}.split_by=position")
    smallest = min(data.dev, data.test, 1 - data.dev - data.test) * tokens
    if smallest >= needed * _MARGIN:
        return settings
    share = math.ceil(100 * needed * _MARGIN / max(1.0, tokens)) / 100
    if share <= 0.3:
        return [*settings, f"data.dev={max(share, data.dev):g}", f"data.test={max(share, data.test):g}"]
    length = 1 << max(0, int(smallest / _MARGIN - 1).bit_length() - 1)
    if length >= _SHORTEST_SEQUENCE:
        return [*settings, f"budget.sequence_length={length}"]
    length = 1 << max(0, int(0.25 * tokens / _MARGIN - 1).bit_length() - 1)
    if length >= _SHORTEST_SEQUENCE:
        return [*settings, "data.dev=0.25", "data.test=0.25", f"budget.sequence_length={length}"]
    return []
