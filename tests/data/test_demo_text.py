"""The demo's text."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from btm_scale.config.data import DomainConfig
from btm_scale.data.demo_text import write_installed_text
from btm_scale.data.documents import BadLines, read_documents
from btm_scale.data.sources import resolve_domain


def test_every_installation_has_four_domains_of_text(tmp_path: Path) -> None:
    domains = write_installed_text(tmp_path / "one", bytes_per_domain=150_000)
    assert list(domains) == ["python", "cpp", "licences", "docs"]
    texts = {}
    for name, values in domains.items():
        config = DomainConfig.model_validate(values)
        documents = list(read_documents(resolve_domain(name, config, tmp_path / "one"), BadLines()))
        texts[name] = [document.text for document in documents]
        size = sum(len(text.encode()) for text in texts[name])
        assert 100_000 < size <= 150_000
        assert max(len(text.encode()) for text in texts[name]) <= 33_000
        assert len(set(texts[name])) == len(texts[name])
    assert any("def " in text for text in texts["python"])
    assert any("#pragma once" in text for text in texts["cpp"])
    assert any("Redistribution and use" in text for text in texts["licences"])

    again = write_installed_text(tmp_path / "two", bytes_per_domain=150_000)
    assert again == domains
    for name in domains:
        assert (tmp_path / "two" / f"{name}.jsonl").read_bytes() == (tmp_path / "one" / f"{name}.jsonl").read_bytes()


def test_the_text_is_spread_over_packages(tmp_path: Path) -> None:
    domains = write_installed_text(tmp_path, bytes_per_domain=500_000)
    sources = defaultdict(set)
    for name in domains:
        for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            sources[name].add("/".join(json.loads(line)["source"].split("/")[:2]))
    assert len(sources["python"]) > 20
    assert len(sources["licences"]) > 5
