"""The verb `serve`: the forest behind OpenAI's API."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from btm_scale.cli.exit_codes import end
from btm_scale.cli.generate import PRIORS
from btm_scale.cli.options import RunFolder, device, flag, max_memory, one_of, opened, option
from btm_scale.cli.verb import Answer, Json, silent, verb
from btm_scale.errors import UserError

METHODS = ("expert", "mixture")

logger = logging.getLogger(__name__)
app = typer.Typer()
_FOREST, _NETWORK, _RESOURCES = "Experts and their weights", "Network", "Resources"


@verb(app, "serve", section="Text")
def serve(
    run: RunFolder,
    *,
    host: Annotated[str, option("--host", "ADDRESS", "Address to listen on.", section=_NETWORK)] = "127.0.0.1",
    port: Annotated[
        int, option("--port", "N", "Port to listen on; 0 takes a free one.", section=_NETWORK, min=0, max=65535)
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        option("--api-key-file", "FILE", "Require one of the keys in this file, one per line.", section=_NETWORK),
    ] = None,
    log_requests: Annotated[
        bool, flag("--log-requests", "Log prompts and texts, too.", rich_help_panel=_NETWORK)
    ] = False,
    backend: Annotated[
        Path | None,
        option(
            "--backend", "FILE", "YAML file with a URL per expert, which engines such as vLLM serve.", section=_FOREST
        ),
    ] = None,
    method: Annotated[
        str | None,
        one_of(
            "--method",
            "method",
            METHODS,
            "What answers as the model 'forest' at temperature 1: one expert, drawn from the posterior of the prompt, "
            "which samples the mixture exactly; or the mixture of all.  [default: expert]",
            section=_FOREST,
        ),
    ] = None,
    prior: Annotated[
        str,
        one_of(
            "--prior",
            "prior",
            PRIORS,
            "Prior over experts: of dev text (mean posterior of its blocks, or best fixed mixture), uniform, or "
            "by the prompt's distance to the clusters.",
            section=_FOREST,
        ),
    ] = "cached",
    domain: Annotated[
        str | None,
        option(
            "--domain",
            "NAME",
            "Domain whose dev text the prior is estimated from.  [default: all training domains]",
            section=_FOREST,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        option("--batch", "N", "Texts that are continued at a time.  [default: 32]", section=_RESOURCES, min=1),
    ] = None,
    max_waiting: Annotated[
        int,
        option("--max-waiting", "N", "Texts that may wait; more get status 429.", section=_RESOURCES, min=1),
    ] = 256,
    max_memory: Annotated[str | None, max_memory(_RESOURCES)] = None,
    prefix_cache: Annotated[
        str | None,
        option(
            "--prefix-cache",
            "SIZE",
            "Keep the KV caches of recent prompts, within this and --max-memory: the next turn of a chat reads only "
            "what is new. 0 keeps none.  [default: 256MB]",
            section=_RESOURCES,
        ),
    ] = None,
    device: Annotated[str | None, device(_RESOURCES)] = None,
    as_json: Json = False,
) -> Answer:
    """Serve the forest over HTTP, with the API of OpenAI.

    The model 'forest' draws one expert per text from the posterior of the prompt. SIGTERM completes what runs.
    """
    try:
        from btm_scale.serve import server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "prometheus_client", "aiohttp"):
            raise
        end(f"{error.name} is not installed: pip install 'btm-scale[serve]'", 2)
    from btm_scale.config.section import bytes_from_text
    from btm_scale.serve.hosts import is_loopback
    from btm_scale.serve.keys import Keys

    here = {"--method": method, "--batch": batch, "--prefix-cache": prefix_cache, "--device": device}
    given = [name for name, value in here.items() if value is not None]
    if backend is not None and given:
        raise UserError(
            f"{' and '.join(given)} cannot be combined with --backend, whose engines generate the text. Leave out "
            f"{' and '.join(given)}, and configure the engines."
        )
    config, run_dir = opened(run)
    keys = Keys.load(api_key_file) if api_key_file else None
    listener = server.bind(host, port)
    url = server.url_of(listener)
    is_local = is_loopback(host)
    if keys is None and not is_local:
        logger.warning("Anyone who reaches %s can use this server. Set --api-key-file, or --host 127.0.0.1.", url)
    max_bytes = bytes_from_text(max_memory) if max_memory else None
    settings: dict[str, Any] = {"prior": prior, "domain": domain, "max_waiting": max_waiting, "max_bytes": max_bytes}
    answering: Any
    if backend is not None:
        planner, answering = server.remote_planner(config, run_dir, backend, **settings)
    else:
        if prefix_cache is not None:
            settings["prefix_bytes"] = 0 if prefix_cache == "0" else bytes_from_text(prefix_cache)
        local = {"method": method, "max_rows": batch, "device": device}
        settings |= {name: value for name, value in local.items() if value is not None}
        planner, answering = server.local_planner(config, run_dir, **settings)
    server.serve(
        planner,
        answering,
        listener,
        name=config.name,
        keys=keys,
        log_requests=log_requests,
        only_local=is_local and keys is None,
    )
    return Answer({"url": url}, silent)
