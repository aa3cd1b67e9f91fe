"""Dry run: report what a run would do, without writing files or building models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from btm_scale.config.moe import mixture_layout
from btm_scale.config.run import RunConfig
from btm_scale.config.seed_share import share_note
from btm_scale.data.adopt_tokenizer import loss_of
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.data.preview import Preview, preview_texts
from btm_scale.data.sources import DomainSource, resolve_sources
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.data.tokenizer_files import has_tokenizer
from btm_scale.run.estimate import disk_bytes, run_seconds
from btm_scale.run.launchers import placement
from btm_scale.run.plan import vocabulary_of
from btm_scale.run.raised import resumes_at
from btm_scale.run.state import continued, on_this_device, require_continuable, require_pretrained
from btm_scale.run_dir import MOE, RunDir
from btm_scale.train.jobs import is_trained, training_job, training_stages
from btm_scale.train.passes import budget_tokens, too_many_passes


def dry_run(config: RunConfig, run: RunDir, *, trains_here: bool = True) -> dict[str, Any]:
    """Return what a run would do: its text, its models with their steps, batches and layouts, and estimates of tokens,
    disk space and, if the groups run on this machine (`trains_here`), time. Writes nothing.

    `changes` are the settings that differ from those of the run in this folder, and what is done again. Checks every
    text path, the first documents of each domain and, with `trains_here`, the precisions. Raises as `run` would,
    except for a pretrained model of which only config.json is there; a refused change is reported together with those
    that are allowed.
    """
    sources = resolve_sources(config.all_domains, config.text_root, config.tokenizer.path)
    changes = require_continuable(config, run)
    config = continued(config, run)
    require_pretrained(config, run, may_lack_weights=True)
    if trains_here:
        config = on_this_device(config, run)
    vocabulary = vocabulary_of(config)
    previews = preview_texts(sources, config, vocabulary)
    jobs = {}
    for stage in training_stages(config):
        place = placement(config, stage)
        for model in stage:
            job = training_job(config, model)
            jobs[model] = {
                "parents": job.branch.parents if job.branch is not None else None,
                "steps": job.steps,
                "batch": f"{job.sequences} x {config.budget.sequence_length} tokens",
                "tokens": job.steps * job.sequences * config.budget.sequence_length,
                "trains": job.trains,
                "layout": str(job.layout),
                "at_a_time": place.slots,
                "done": is_trained(config, run, model),
                "resumes_at": None if is_trained(config, run, model) else resumes_at(run, job),
            }
    text = _text(config, run, sources, previews)
    tokens = sum(row["tokens"] for row in text.values())
    notes = [previews[name].problem for name in text if previews[name].problem and not text[name]["encoded"]]
    notes += filter(None, [share_note(config)])
    notes += [note for name, row in text.items() if (note := too_many_passes(config, name, row["passes"]))]
    if config.moe is not None and (layout := mixture_layout(config)).tensor > 1:
        notes.append(f"{MOE}: sequence_parallel is on, because experts need it with tensor={layout.tensor}")
    tokenizer = config.tokenizer.path
    if tokenizer is not None and has_tokenizer(tokenizer):
        notes += filter(None, [loss_of(Tokenizer.load(tokenizer), tokenizer)])
    done = {name for name, job in jobs.items() if job["done"]}
    taken = {name: resumes_at(run, training_job(config, name)) or 0 for name in jobs if name not in done}
    return {
        "run": str(run.root),
        "changes": [
            {"key": ".".join(one.path), "before": one.before, "after": one.after, "effect": one.effect}
            for one in changes
        ],
        "parameters": config.model.shape(vocabulary, config.budget.sequence_length).parameters,
        "text": text,
        "models": jobs,
        "estimates": {
            "seconds": run_seconds(config, vocabulary, done, taken) if trains_here else None,
            "disk_bytes": round(disk_bytes(config, vocabulary, tokens)),
        },
        "notes": notes,
    }


def _text(
    config: RunConfig, run: RunDir, sources: Sequence[DomainSource], previews: dict[str, Preview]
) -> dict[str, dict[str, Any]]:
    """Return the text of each domain, the training tokens that come from it, and how often that is its train split.

    Tokens are estimated, unless they are `encoded` already.
    """
    rows = {}
    for source in sources:
        fingerprint = Fingerprint.find(run.fingerprint(source.name))
        if fingerprint is None:
            tokens = previews[source.name].tokens
            train = tokens * (1 - config.data.dev - config.data.test)
        else:
            tokens, train = fingerprint.tokens, float(fingerprint.splits["train"].per_pass)
        budget = budget_tokens(config, source.name)
        rows[source.name] = {
            "files": len(source.files),
            "bytes": source.bytes,
            "tokens": tokens,
            "encoded": fingerprint is not None,
            "budget_tokens": budget,
            "passes": budget / max(1.0, train),
        }
    return rows
