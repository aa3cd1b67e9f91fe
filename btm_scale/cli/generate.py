"""The verb `generate`: text from the forest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from btm_scale.cli.options import (
    RandomSeed,
    RunFolder,
    device,
    max_memory,
    models_of_run,
    one_of,
    opened,
    option,
    several,
)
from btm_scale.cli.verb import Answer, Json, say, silent, verb
from btm_scale.errors import UserError

if TYPE_CHECKING:
    from btm_scale.generate.request import Piece

# As generate/request.py and forest/priors.py have them, which need NumPy.
METHODS = ("expert", "per-token", "mixture")
POSTERIORS = ("prefix", "token", "tempered", "fixed")
PRIORS = ("cached", "static", "uniform", "routed")

app = typer.Typer()
_WEIGHTS, _SAMPLING, _RESOURCES = "Experts and their weights", "Sampling", "Resources"


@verb(app, "generate", section="Text")
def generate(
    run: RunFolder,
    *,
    prompts: Annotated[list[str], several("--prompt", "TEXT", "Text to continue. May be repeated.")],
    prompts_file: Annotated[Path | None, option("--prompts", "FILE", "File with one prompt per line.")] = None,
    chat: Annotated[
        Path | None,
        option(
            "--chat",
            "FILE",
            "Generate the next answer of each conversation in FILE, one per line: a JSON object with `messages`.",
        ),
    ] = None,
    max_tokens: Annotated[int, option("--max-tokens", "N", "Generate at most N tokens per prompt.")] = 128,
    stop: Annotated[list[str], several("--stop", "TEXT", "Stop before this text. May be repeated.")],
    models: Annotated[
        list[str],
        several(
            "--model",
            "NAME",
            "Use only this model: an expert, seed, dense, moe, average/uniform. May be repeated.  "
            "[default: all experts]",
            section=_WEIGHTS,
            complete=models_of_run,
        ),
    ],
    method: Annotated[
        str,
        one_of(
            "--method",
            "generation method",
            METHODS,
            "expert: one expert, drawn from the posterior of the prompt, generates the text; this samples the ensemble "
            "exactly. per-token: an expert is drawn for each token. mixture: tokens are sampled from the mixture of "
            "the experts' probabilities.",
            section=_WEIGHTS,
        ),
    ] = "expert",
    posterior: Annotated[
        str,
        one_of(
            "--posterior",
            "posterior",
            POSTERIORS,
            "Posterior over experts: of all tokens so far, of the last token, tempered, or the prior alone (fixed). "
            "The method 'expert' works with prefix only.",
            section=_WEIGHTS,
        ),
    ] = "prefix",
    prior: Annotated[
        str,
        one_of(
            "--prior",
            "prior",
            PRIORS,
            "Prior over experts: of dev text (mean posterior of its blocks, or best fixed mixture), uniform, or "
            "by the prompt's distance to the clusters.",
            section=_WEIGHTS,
        ),
    ] = "cached",
    domain: Annotated[
        str | None,
        option(
            "--domain",
            "NAME",
            "Domain whose dev text the prior is estimated from.  [default: all training domains]",
            section=_WEIGHTS,
        ),
    ] = None,
    route_top_k: Annotated[
        int | None,
        option(
            "--route-top-k",
            "K",
            "With the prior 'routed', use the experts of the K nearest clusters only.",
            section=_WEIGHTS,
        ),
    ] = None,
    temperature: Annotated[
        float, option("--temperature", "T", "Temperature of the method 'mixture'; 0 is greedy.", section=_SAMPLING)
    ] = 1.0,
    top_k: Annotated[
        int | None, option("--top-k", "K", "Sample from the K most likely tokens.", section=_SAMPLING)
    ] = None,
    top_p: Annotated[
        float | None,
        option("--top-p", "P", "Sample from the fewest tokens whose probabilities sum to P.", section=_SAMPLING),
    ] = None,
    random_seed: RandomSeed = 0,
    batch: Annotated[int, option("--batch", "N", "Prompts per batch.", section=_RESOURCES)] = 32,
    max_memory: Annotated[str | None, max_memory(_RESOURCES)] = None,
    device: Annotated[str | None, device(_RESOURCES)] = None,
    as_json: Json = False,
) -> Answer:
    """Continue prompts with the ensemble of experts.

    The text of one prompt is printed as it is generated; the text of several, when each is complete.
    """
    from dataclasses import asdict

    from btm_scale.config.section import bytes_from_text
    from btm_scale.generate.generator import Generator
    from btm_scale.generate.sampling import Sampling

    config, run_dir = opened(run)
    encoded = None
    if chat is None:
        texts = prompts_of(prompts, prompts_file)
    else:
        from btm_scale.generate.chats import chat_prompts

        if prompts or prompts_file is not None:
            raise UserError(
                "--chat was given with --prompt or --prompts. A call continues conversations or prompts: remove one."
            )
        chats = chat_prompts(config, run_dir, chat, domain)
        texts, encoded, stop = chats.texts, chats.ids, [*stop, *chats.stop]
    generator = Generator.of_run(
        config,
        run_dir,
        models=models,
        prior=prior,
        route_top_k=route_top_k,
        domain=domain,
        method=method,
        posterior=posterior,
        sampling=Sampling(temperature, top_k, top_p),
        max_bytes=bytes_from_text(max_memory) if max_memory else None,
        device=device,
    )
    generations = {}
    for piece in generator.stream(
        texts, max_tokens=max_tokens, stop=stop, random_seed=random_seed, batch=batch, encoded=encoded
    ):
        if piece.whole is not None:
            generations[piece.prompt] = asdict(piece.whole)
        if not as_json:
            _show_piece(texts, piece)
    in_order = [generations[number] for number in range(len(texts))]
    return Answer({"method": generator.method, "generations": in_order}, silent)


def prompts_of(given: Sequence[str], file: Path | None) -> list[str]:
    """The prompts given one by one and those of a file, one a line. Raises UserError if there are none."""
    from btm_scale.data.files import is_utf8

    prompts = list(given)
    if file is not None:
        try:
            text = file.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"Cannot read prompts from {file}: {error}. Give a UTF-8 text file with one prompt per line."
            ) from None
        # Not splitlines, which also splits at characters that a prompt may have, such as a form feed.
        lines = text.removesuffix("\n").split("\n") if text else []
        prompts += [line.removesuffix("\r") for line in lines]
    if not prompts:
        raise UserError("There is no prompt to continue. Give --prompt TEXT, --prompts FILE or --chat FILE.")
    for prompt in prompts:
        if not is_utf8(prompt):
            raise UserError(f"the prompt {prompt!r} is not UTF-8; a tokenizer reads UTF-8 text")
    return prompts


def _show_piece(prompts: Sequence[str], piece: Piece) -> None:
    """Print one prompt's text as it comes; of several, each continuation when it is complete."""
    if len(prompts) == 1:
        say(piece.text, end="\n" if piece.whole else "")
    elif piece.whole:
        say(f"--- {piece.whole.prompt}\n{piece.whole.text}")
