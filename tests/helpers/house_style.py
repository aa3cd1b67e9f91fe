"""Phrases that English-speaking engineers would not write, each with what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_UNITS = (
    "(?:batch|block|checkpoint|command|core|document|domain|expert|figure|file|group|host|job|line|machine|method|model|"
    "node|parameter|process|prompt|rank|run|second|seed|stage|step|subset|test|text|thread|token)"
)
_COUNTED = (
    "(?:one|once|twice|bytes|tokens|steps|seconds|minutes|times|files|ranks|nodes|pieces|checkpoints|prompts?|columns?|"
    "lines?|traces?|tasks?|objects?|streams?|texts?|[Gg]enerations?)"
)

# Regular expressions, without regard to case; a space is any white space. Order is that of the guide.
RULES = {
    r"told|tells(?! apart)": "is reported, raises, prints, warns",
    r"a word about|without a word": "describes; without an error",
    r"go(?:es|ing)? on|went on|gone on": "resumes, continues",
    r"st(?:and|ands|ood)(?: alike)?|st(?:and|ands|ood)[- ]ins?": "is, exists, appears, means; placeholder",
    r"lies?|lain": "is, is stored",
    r"(?<!there )(?:is|are|was|were) none of": "is not one of",
    r"(?<!there )(?:is|are|was|were) no(?! (?:longer|more|less|fewer|other|better|worse)\b)": "is not a ..., invalid",
    r"so many": "this many, N",
    rf"{_COUNTED} an? (?:\w+ )?{_UNITS}": "one per step",
    rf"an? \w+ an? {_UNITS}(?= |[.,;:)])": "one ... per ...",
    r"an? (?:\w+ )?share of": "a fraction of",
    r"of (?:its|their|his|her|your|our|my) own(?! (?:document|text|size|domain|node|host)\b)": "its own, separate",
    r"of another (?:kind|sort|type|form|shape|size|config|format|layout|schema|precision)": "a different ...",
    r"another (?:\w+ ){1,2}than": "a different ... than",
    r"whoever|whomever|somebody|someone|nobody|anybody": "the caller, the user, the process",
    r"what of it is": "completed ...",
    r"mend(?:s|ed|ing)?": "fix",
    r"dear(?:er|est)?": "expensive",
    r"likeliest": "most likely",
    r"turned (?:by|query|queries|keys?|pairs?)": "rotated",
    r"(?<!as a )whole(?! (?:numbers?|words?|tensors?|files?|documents?|layers?)\b)": "complete, entire, full, all of",
    r"training[- ]states?|states? of (?:the )?training": "checkpoint",
    r"groups? of heads|heads? groups?|key[- ]value groups?|kv groups?": "KV heads",
    r"weighed|weighing|weighs? some": "weighted; weights must be ...",
    r"at the least|at the most": "at least, at most",
}


def _compiled(pattern: str) -> re.Pattern[str]:
    """A space is any white space, one character of it where a pattern looks behind."""
    spaced = re.sub(r"\(\?<!.*?\)| ", lambda part: part[0].replace(" ", r"\s" + "+" * (part[0] == " ")), pattern)
    return re.compile(rf"\b(?:{spaced})\b", re.IGNORECASE)


_COMPILED = {_compiled(pattern): replacement for pattern, replacement in RULES.items()}


@dataclass(frozen=True)
class Hit:
    """A phrase of the guide in a text: where it is, what it says, what to write."""

    file: str
    line: int
    phrase: str
    replacement: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: '{self.phrase}' -> {self.replacement}"


def hits(file: str, text: str, line: int = 1) -> Iterator[Hit]:
    """Every phrase of the guide in a text that begins at `line` of a file."""
    sentences = text.replace("\n\n", ".\n")  # a phrase does not cross the end of a paragraph
    for pattern, replacement in _COMPILED.items():
        for match in pattern.finditer(sentences):
            yield Hit(file, line + text.count("\n", 0, match.start()), " ".join(match[0].split()), replacement)
