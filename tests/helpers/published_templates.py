"""Published chat templates, read from the packages that `make chat-templates` installs, and the tokens they write."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Beside the environment's packages, of which some have other versions than these want.
PACKAGES = Path(os.environ.get("BTM_SCALE_CHAT_TEMPLATES", f"{sys.prefix}/chat-templates"))
# Versions of Mistral's tokenizers, and whether they are sentencepiece models, whose templates write more spaces.
_MISTRAL = {"mistral_v1": ("v1", True), "mistral_v3": ("v3", True), "mistral_v7": ("v7", True)}
_MISTRAL |= {"mistral_nemo": ("v3", False), "mistral_v11": ("v11", False), "mistral_v13": ("v13", False)}
_GENERATOR = """
import json, sys
from mistral_common.integrations.chat_templates.template_generator import TemplateConfig, build_chat_template
from mistral_common.tokens.tokenizers.base import TokenizerVersion
templates = {
    name: build_chat_template(TemplateConfig(TokenizerVersion(version), spm=spm, use_special_token_variables=True))
    for name, (version, spm) in json.loads(sys.argv[1]).items()
}
print(json.dumps(templates))
"""


@dataclass(frozen=True)
class Family:
    """The special tokens of a family, and what its template writes around the text of an answer."""

    end: str  # of a turn
    special: tuple[str, ...]
    bos: str = "<s>"
    eos: str = "</s>"
    strips: bool = False  # the text of turns
    has_system: bool = True
    before: str = ""  # each answer
    before_last: str | None = None  # the last, if something else
    end_of_last: str | None = None
    marked_before: str = ""  # what trl's template for training marks as well
    marked_after: str = ""


_CHATML = ("<|im_start|>", "<|im_end|>")
_LLAMA = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_INST = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
_GEMMA = ("<start_of_turn>", "<end_of_turn>")
_THOUGHT = ("<think>", "</think>")
_NO_THOUGHT = "<think>\n\n</think>\n\n"
BAR = "\uff5c"  # a wide |
_DEEPSEEK = Family(
    f"<{BAR}end▁of▁sentence{BAR}>",
    (f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>", *_THOUGHT),
    f"<{BAR}begin▁of▁sentence{BAR}>",
    f"<{BAR}end▁of▁sentence{BAR}>",
    marked_before=f"<{BAR}Assistant{BAR}>",
)
_LLAMA3 = Family("<|eot_id|>", _LLAMA, "<|begin_of_text|>", "<|eot_id|>", strips=True)
_MISTRAL_SPACED, _MISTRAL_BARE = Family("</s>", _INST, before=" "), Family("</s>", _INST)
_GEMMA1 = Family("<end_of_turn>", _GEMMA, "<bos>", "<eos>", strips=True, has_system=False, marked_after="\n")
_PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_QWEN = Family("<|im_end|>", _CHATML, eos="<|im_end|>", marked_after="\n")
_COHERE = (
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
)
_VISION = Family("<end_of_utterance>", ("<|im_start|>", "<end_of_utterance>"), before=" ", marked_after="\n")

# By the name of the template: of trl's file, or of _MISTRAL.
FAMILIES: dict[str, Family] = {
    "qwen2_5": Family("<|im_end|>", _CHATML, eos="<|im_end|>", marked_before="\n", marked_after="\n"),
    "qwen3": Family("<|im_end|>", (*_CHATML, *_THOUGHT), eos="<|im_end|>", before_last=_NO_THOUGHT, marked_after="\n"),
    "qwen3_instruct_2507": _QWEN,
    "llama3": _LLAMA3,
    "llama3_1": _LLAMA3,
    "llama3_2": _LLAMA3,
    "mistral_v1": _MISTRAL_SPACED,
    "mistral_v3": _MISTRAL_SPACED,
    "mistral_v7": _MISTRAL_SPACED,
    "mistral_nemo": _MISTRAL_BARE,
    "mistral_v11": _MISTRAL_BARE,
    "mistral_v13": _MISTRAL_BARE,
    "gemma": _GEMMA1,
    "gemma3": Family("<end_of_turn>", _GEMMA, "<bos>", "<eos>", strips=True, marked_after="\n"),
    "deepseekv3": _DEEPSEEK,
    "deepseek_r1_distill": _DEEPSEEK,
    "phi3": Family("<|end|>", (*_PHI, "<|endoftext|>"), eos="<|endoftext|>", marked_after="\n"),
    "phi3_5": Family("<|end|>", (*_PHI, "<|endoftext|>"), eos="<|endoftext|>", marked_after="\n"),
    "gptoss": Family(
        "<|end|>",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
        eos="<|return|>",
        before="<|channel|>final<|message|>",
        end_of_last="<|return|>",
        marked_before="<|start|>assistant",
    ),
    "cohere": Family("<|END_OF_TURN_TOKEN|>", _COHERE, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", strips=True),
    "lfm2": Family("<|im_end|>", _CHATML, "<|startoftext|>", "<|im_end|>", marked_after="\n"),
    # These read lists of parts only.
    "smolvlm": _VISION,
    "idefics3": _VISION,
    "llava_next": Family("</s>", (), before=" "),
}


def template(name: str) -> str:
    """Return a published template."""
    return mistral_templates()[name] if name in _MISTRAL else _trl_file(name).read_text(encoding="utf-8")


def marked_template(name: str) -> str | None:
    """Return trl's variant of a template that marks answers, if there is one."""
    path = _trl_file(f"{name}_training")
    return path.read_text(encoding="utf-8") if path.is_file() else None


def marked_names() -> list[str]:
    """Return the names of all templates of which trl has such a variant."""
    return sorted(path.stem.removesuffix("_training") for path in _trl_file("").parent.glob("*_training.jinja"))


def _trl_file(name: str) -> Path:
    assert PACKAGES.is_dir(), f"{PACKAGES} does not exist. It holds chat templates: run `make chat-templates`."
    return PACKAGES / "trl" / "chat_templates" / f"{name}.jinja"


@functools.cache
def mistral_templates() -> dict[str, str]:
    """Return the templates of Mistral's tokenizers: mistral-common generates them."""
    _trl_file("")
    command = [sys.executable, "-c", _GENERATOR, json.dumps(_MISTRAL)]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGES)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    templates: dict[str, str] = json.loads(done.stdout)
    return templates
