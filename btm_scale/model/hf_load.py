"""The only door to transformers' loaders: model directories come from strangers, and no code in them ever runs.

A directory can name Python files (`auto_map`), attention kernels to fetch, quantizers to import and a base model
elsewhere. The settings that do so are dropped or refused here, whatever the defaults of the installed transformers.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btm_scale.errors import CheckpointError, UserError, few_names
from btm_scale.model.hf_config import read_config, require_no_adapter
from btm_scale.util.bounded_json import parse_json, read_bounded
from btm_scale.util.inside import file_inside
from btm_scale.util.records import read_object

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# With the package `kernels`, transformers fetches code for some families from the Hub, on GPUs, whatever the switches.
os.environ["USE_HUB_KERNELS"] = "0"

# Settings of config.json that make transformers run, import or fetch something else than the model's own class.
_ACTIVE_SETTINGS = (
    "auto_map",
    "custom_pipelines",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
)
_EXPANDED_SETTINGS = ("quantization_config", "num_labels", "id2label", "label2id")
_MOST_LAYERS = 100_000
_INDEX = (".safetensors.index.json", ".bin.index.json")
_DESCRIBING = {".json", ".txt", ".model", ".jinja"}
_PIPELINE_PROBES = ("a  b\n\tc", " 2023-01-15 12345", "don't, I'll: x=y; naïve 北京 🎉", "def f(x):\n    return x")
_SAFE = {"local_files_only": True, "trust_remote_code": False}


def load_config(directory: Path) -> Any:
    """Return the transformers config of a Hugging Face directory, without any setting that would run its code.

    Raises CheckpointError if config.json is absent or damaged, or if transformers has no class for its model type.
    """
    from transformers import CONFIG_MAPPING

    settings = read_config(directory)
    family = settings.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        code = " Its own Python code (`auto_map`) is never run." if "auto_map" in settings else ""
        raise CheckpointError(
            f"transformers has no model type {family!r}, which {directory / 'config.json'} names.{code} "
            "Convert the model to a type that transformers includes."
        )
    if "quantization_config" in settings:
        raise CheckpointError(f"The weights in {directory} are quantized. Write them in bf16, fp16 or fp32 first.")
    clean = {name: _passive(value) for name, value in settings.items() if name not in _ACTIVE_SETTINGS}
    if not _has_small_counts(clean):
        raise CheckpointError(
            f"{directory / 'config.json'} has more than {_MOST_LAYERS:,} layers. No model has as many. Copy it again."
        )
    with _readable(directory):
        return CONFIG_MAPPING[family].from_dict(clean)


def completed_config(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a config with every default of its model type, as the installed transformers reads it.

    None if transformers has no class for its model type, or cannot read it.
    """
    from transformers import CONFIG_MAPPING

    family = settings.get("model_type")
    dropped = (*_ACTIVE_SETTINGS, *_EXPANDED_SETTINGS)
    clean = {name: _passive(value) for name, value in settings.items() if name not in dropped}
    if not isinstance(family, str) or family not in CONFIG_MAPPING or not _has_small_counts(clean):
        return None
    try:
        with _no_warnings():
            return dict(CONFIG_MAPPING[family].from_dict(clean).to_dict())
    except Exception:  # whatever the class of a family raises for values that it does not expect
        return None


def _has_small_counts(settings: Mapping[str, Any]) -> bool:
    """Whether no number of layers is so large that a list with an item per layer would fill memory."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and not _has_small_counts(value):
            return False
        if "layer" in name and isinstance(value, int) and value > _MOST_LAYERS:
            return False
    return True


def _passive(value: Any) -> Any:
    """Return a setting without the active ones in it: the configs of a model's parts are read like its own.

    Infinities, which transformers writes as an object that names them, become floats.
    """
    if isinstance(value, list):
        return [_passive(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {name: _passive(item) for name, item in value.items() if name not in _ACTIVE_SETTINGS}


def require_causal_lm(directory: Path) -> Any:
    """Return the transformers config of a Hugging Face directory whose type has a causal LM class in transformers.

    Raises CheckpointError as `load_config` does, and for a type without such a class.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = load_config(directory)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"{directory / 'config.json'} is of type '{config.model_type}', for which transformers has no causal LM. "
            "Only causal LMs give probabilities of text. Choose another model."
        )
    return config


def load_causal_lm(directory: Path, dtype: torch.dtype | str = "auto") -> Any:
    """Return the model of a Hugging Face directory, by default in the dtype of its weights.

    Raises CheckpointError if it cannot be loaded, or lacks weights, which transformers would draw at random.
    """
    from transformers import AutoModelForCausalLM

    config = require_causal_lm(directory)
    require_no_adapter(directory)
    _require_own_weights(directory)
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        config._attn_implementation = "eager"  # others refuse soft caps, or leave them out
    with _readable(directory), _no_progress_bar():
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=dtype, weights_only=True, output_loading_info=True, **_SAFE
        )
    if lacking := report["missing_keys"]:
        raise CheckpointError(
            f"{directory} lacks {few_names(lacking, 'tensors')}. A model has all the tensors of its config.json. Copy "
            "the weights again, or use the config.json that belongs to them."
        )
    if unused := report["unexpected_keys"]:
        logger.warning("%s has tensors that its model does not use: %s", directory, few_names(unused, "tensors"))
    return model


def _require_own_weights(directory: Path) -> None:
    """Raise CheckpointError if a file of a model, or one that its index names, is outside of its directory."""
    for path in sorted(directory.iterdir()):
        file_inside(directory, path.name)
        if path.name.endswith(_INDEX):
            shards = read_object(path, CheckpointError).get("weight_map")
            for name in shards.values() if isinstance(shards, dict) else ():
                file_inside(directory, str(name))


def import_transformers() -> None:
    """Import the part of transformers that loads tokenizers, so that forked processes share it."""
    import transformers

    _ = transformers.AutoTokenizer


def require_own_files(directory: Path) -> None:
    """Raise CheckpointError if a file that describes a model or a tokenizer is a link out of its directory."""
    for path in sorted(directory.iterdir()):
        if path.suffix in _DESCRIBING:
            file_inside(directory, path.name)


def load_tokenizer(directory: Path) -> Any:
    """Return what `transformers.AutoTokenizer` loads from a directory.

    Raises ValueError, with the library's reason, if it can't be loaded; a panic in its Rust code is such a reason.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if _names_code(directory):
        if not (directory / "tokenizer.json").is_file():
            raise ValueError("its tokenizer is Python code, which is never run. Add a tokenizer.json of the same ids")
        logger.warning("%s names Python code, which is never run: its tokenizer.json is used", directory)
        with library_panics(directory):
            return PreTrainedTokenizerFast.from_pretrained(str(directory), **_SAFE)
    with library_panics(directory):
        if (directory / "tekken.json").is_file():  # which mistral-common, if installed, would use instead
            tokenizer = AutoTokenizer.from_pretrained(str(directory), mistral_format=False, **_SAFE)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), **_SAFE)
        return _as_described(tokenizer, directory)


def _names_code(directory: Path) -> bool:
    """Whether tokenizer_config.json names a Python file of the directory as its tokenizer."""
    path = directory / "tokenizer_config.json"
    settings = parse_json(read_bounded(path)) if path.is_file() else None
    codes = settings.get("auto_map") if isinstance(settings, dict) else None
    return bool(codes) and (not isinstance(codes, dict) or "AutoTokenizer" in codes)


def _as_described(tokenizer: Any, directory: Path) -> Any:
    """Return the tokenizer as its tokenizer.json describes it.

    Some classes of transformers replace parts of that file by their own, and tokenizer_config.json often names a class
    that its model never used.
    """
    from transformers import PreTrainedTokenizerFast

    file = directory / "tokenizer.json"
    is_rebuilt = type(tokenizer) is not PreTrainedTokenizerFast and "__init__" in vars(type(tokenizer))
    if not is_rebuilt or not file.is_file() or _has_parts_of(tokenizer, file):
        return tokenizer
    described = PreTrainedTokenizerFast.from_pretrained(str(directory), **_SAFE)
    if all(_ids(tokenizer, text) == _ids(described, text) for text in _PIPELINE_PROBES):
        return tokenizer
    logger.warning(
        "%s names the class %s, whose ids differ from those of tokenizer.json. The latter are used",
        directory / "tokenizer_config.json",
        type(tokenizer).__name__,
    )
    return described


def _has_parts_of(tokenizer: Any, file: Path) -> bool:
    """Whether a tokenizer normalizes and cuts text as a tokenizer.json says, to the letter."""
    content, backend = parse_json(read_bounded(file)), tokenizer.backend_tokenizer
    parts = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer, "decoder": backend.decoder}
    return all(
        content.get(name) == (None if part is None else parse_json(part.__getstate__())) for name, part in parts.items()
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def load_tekken(path: Path) -> Any:
    """Return the tokenizer of a tekken.json, as transformers converts it. Raises ValueError if it cannot."""
    try:
        from transformers.integrations.mistral.tokenizer import MistralConverter
    except ImportError:
        raise ValueError(
            "transformers.integrations.mistral is not in this version of transformers. Install a newer version, or add "
            "the tokenizer.json of the model's Hugging Face version"
        ) from None
    from transformers import PreTrainedTokenizerFast

    content = parse_json(read_bounded(path))
    special = content.get("special_tokens") if isinstance(content, dict) else None
    if not isinstance(special, list):
        raise ValueError(
            "its tekken.json lists no special tokens, as in the first versions of that format. Add the tokenizer.json "
            "of the model's Hugging Face version"
        )
    listed = {entry.get("token_str") for entry in special if isinstance(entry, dict)}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    with library_panics(path):
        return PreTrainedTokenizerFast(
            tokenizer_object=MistralConverter(str(path)).converted(),
            clean_up_tokenization_spaces=False,
            **{name: token for name, token in named.items() if token in listed},
        )


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], special: Mapping[str, str], **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Render a chat with a Jinja template in transformers' sandbox; return the text and the marked ranges.

    With `return_assistant_tokens_mask`, these are the ranges of characters in `{% generation %}` blocks. Raises what
    the template raises.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, marked = render_jinja_template([list(messages)], chat_template=template, **options, **special)
    return texts[0], [(begin, end) for begin, end in marked[0]] if marked else []


def new_cache(model: Any) -> Any:
    """Return an empty KV cache for a model of `load_causal_lm`."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


@contextlib.contextmanager
def library_panics(directory: Path) -> Iterator[None]:
    """Turn a panic of a Rust library, which is no Exception in Python, into a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"its Rust library panicked: {error}") from None


@contextlib.contextmanager
def _readable(directory: Path) -> Iterator[None]:
    try:
        with library_panics(directory):
            yield
    except UserError:
        raise
    except Exception as error:  # a damaged file can end in any error of transformers, safetensors or huggingface_hub
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise CheckpointError(f"transformers cannot load {directory}: {reason}. Copy or train it again.") from None


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Models may be loaded once per expert and batch; transformers would draw a bar each time."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Settings that a class does not expect are compared here, not reported by transformers."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
