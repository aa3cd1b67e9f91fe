"""Tokenizing speed and memory, from source files to token files, beside sentencepiece alone.

    python benchmarks/encode.py [--corpora DIR] [--sizes 10 100 1000] [--out benchmarks/results/encode.json]

Rate: reading, splitting, dropping duplicates, encoding and writing, beside
`SentencePieceProcessor.encode(texts, num_threads=workers)` on the same texts in memory; the two
alternate.
Memory: the peak of the main process and its workers together, one fresh process per size.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import sentencepiece
from environment import describe

from btm_scale.config.run import RunConfig
from btm_scale.data.demo_text import write_installed_text
from btm_scale.data.encode import Encoder
from btm_scale.data.prepare import prepare
from btm_scale.data.sources import resolve_sources
from btm_scale.data.token_files import write_domain
from btm_scale.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 5
RATE_MEGABYTES = 16
VOCABULARY = 4096


def real_text(corpora: Path | None, scratch: Path) -> list[str]:
    """Documents of several domains, mixed."""
    if corpora is not None:
        paths = sorted(corpora.glob("*.jsonl.gz"))
        texts = []
        for path in paths:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                texts.append([json.loads(line)["text"] for line in file])
    else:
        write_installed_text(scratch / "installed", bytes_per_domain=8_000_000)
        texts = [
            [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
            for path in sorted((scratch / "installed").glob("*.jsonl"))
        ]
    longest = max(map(len, texts))
    return [domain[i] for i in range(longest) for domain in texts if i < len(domain)]


def repeated(texts: list[str], size: int) -> Iterator[str]:
    """Return `size` bytes of text; a number distinguishes each repetition, which would be dropped as a duplicate."""
    turn = written = 0
    while True:
        for text in texts:
            varied = f"{turn}\n{text}" if turn else text
            written += len(varied.encode())
            if written > size:
                return
            yield varied
        turn += 1


def write_text(path: Path, texts: Iterator[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def config_for(folder: Path, name: str, workers: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "text_root": folder,
            "domains": {"text": {"text": name}},
            "tokenizer": {"vocab_size": VOCABULARY, "sample_bytes": 4_000_000},
            "data": {"workers": workers},
        }
    )


def rates(texts: list[str], scratch: Path, workers: int) -> dict[str, Any]:
    """Bytes per second of both, measured alternately."""
    texts = list(repeated(texts, RATE_MEGABYTES * 10**6))
    size = sum(len(text.encode()) for text in texts)
    write_text(scratch / "rate.jsonl", iter(texts))
    config, run = config_for(scratch, "rate.jsonl", workers), RunDir(scratch / "rate")
    prepare(config, run)
    model = sentencepiece.SentencePieceProcessor(model_file=str(run.tokenizer / "tokenizer.model"))
    ours, theirs = [], []
    [source] = resolve_sources(config.domains, config.text_root)
    with Encoder(run.tokenizer, workers) as encoder:
        list(encoder.encode((text, None) for text in texts[:500]))  # the workers are up
        for turn in range(ROUNDS):
            folder = scratch / f"turn{turn}"
            folder.mkdir()
            ours.append(timed(partial(write_domain, source, config, encoder, folder, {}, lambda *_: None)))
            theirs.append(timed(partial(model.encode, texts, num_threads=workers)))
    ratios = {
        kind: [other[kind] / own[kind] for own, other in zip(ours, theirs, strict=True)]
        for kind in ("seconds", "processor_seconds")
    }
    return {
        "text_bytes": size,
        "btm_scale": ours,
        "sentencepiece": theirs,
        "btm_scale_bytes_per_second": size / statistics.median(turn["seconds"] for turn in ours),
        "sentencepiece_bytes_per_second": size / statistics.median(turn["seconds"] for turn in theirs),
        "ratios": ratios,
        "median_ratio": statistics.median(ratios["seconds"]),
        "median_processor_ratio": statistics.median(ratios["processor_seconds"]),
    }


def process_ids() -> list[int]:
    """This process and its workers."""
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Wall-clock seconds, and CPU seconds of all processes, which depend little on other load."""
    processes = [psutil.Process(pid) for pid in process_ids()]

    def processor_seconds() -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in processes))

    start, before = time.perf_counter(), processor_seconds()
    work()
    return {"seconds": time.perf_counter() - start, "processor_seconds": processor_seconds() - before}


def peak_bytes(process: int) -> int:
    """Peak resident memory of a process, from the kernel."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def measure_memory(scratch: Path, name: str, tokenizer: Path, workers: int) -> dict[str, Any]:
    """Encode one file in this process, which does nothing else."""
    config, run = config_for(scratch, name, workers), RunDir(scratch / f"run.{name}")
    run.root.mkdir()
    run.tokenizer.symlink_to(tokenizer)
    peaks: dict[int, int] = {}

    def watch(*_: Any) -> None:
        for process in process_ids():
            peaks[process] = peak_bytes(process)

    start = time.perf_counter()
    prepare(config, run, watch)
    seconds = time.perf_counter() - start
    peaks[os.getpid()] = peak_bytes(os.getpid())
    return {
        "text_bytes": (scratch / name).stat().st_size,
        "seconds": seconds,
        "peak_bytes": sum(peaks.values()),
        "main_process_peak_bytes": peaks[os.getpid()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, help="folder of .jsonl.gz files; default: installed packages' text")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10, 100, 1000], help="megabytes of text")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "encode.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        texts = real_text(arguments.corpora, scratch)
        result: dict[str, Any] = {
            "environment": describe(),
            "text": "eight corpora" if arguments.corpora else "installed packages",
            "vocabulary": VOCABULARY,
            "workers": arguments.workers,
            "rate": rates(texts, scratch, arguments.workers),
            "memory": [],
        }
        rate = result["rate"]
        print(
            f"rate: {rate['median_ratio']:.2f} of sentencepiece's by the clock, "
            f"{rate['median_processor_ratio']:.2f} by processor time",
            flush=True,
        )
        for megabytes in arguments.sizes:
            name = f"{megabytes}mb.jsonl"
            write_text(scratch / name, repeated(texts, megabytes * 10**6))
            job = (scratch, name, scratch / "rate" / "tokenizer", arguments.workers)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                result["memory"].append(fresh.submit(measure_memory, *job).result())
            (scratch / name).unlink()
            print(f"{megabytes} MB: peak {result['memory'][-1]['peak_bytes'] / 1e6:.0f} MB", flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
