"""Secrets, which no file, log or error may hold: fields that name one, access tokens, and passwords in URLs."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

MASK = "HIDDEN"
_NAME = r"(?:\w*[-_])?(?:token|api[-_]?key|access[-_]?key|secret|password|passwd|credentials?|signature)"
#: Tokens of a vocabulary, and the settings of a metric.
_SPECIAL = (
    r"(?:(?:additional|bos|cls|decoder_start|eos|image|mask|pad|sep|unk)[-_](?:special[-_])?token"
    r"|(?:bleu|chrf|sacrebleu)[-_]signature)"
)
_IS_NAME = re.compile(rf"-*(?!{_SPECIAL}$){_NAME}", re.IGNORECASE)
_PATTERNS = (
    # --hub_token VALUE; then "token": "VALUE" and token=VALUE.
    (rf"(--(?!{_SPECIAL}\b){_NAME}\s+)('[^']*'|[^\s'\"]+)", rf"\1{MASK}"),
    (rf"(\b(?!{_SPECIAL}\b){_NAME}\\?[\"']?\s*[=:]\s*)(\\?[\"'])[^\"']*\2", rf"\1\2{MASK}\2"),
    (rf"(\b(?!{_SPECIAL}\b){_NAME}\\?[\"']?\s*[=:]\s*)[^\s\"'\\&,;}})\]]+", rf"\1{MASK}"),
    # https://user:password@host
    (r"([a-z][a-z0-9+.-]*://)[^/\s'\"]*@", rf"\1{MASK}@"),
    # Access tokens by their form: Hugging Face, OpenAI and others, GitHub.
    (r"\b(?:hf_|api_org_|sk-|gh[pousr]_|github_pat_)[A-Za-z0-9_-]{16,}", MASK),
)
_COMPILED = tuple((re.compile(pattern, re.IGNORECASE), replacement) for pattern, replacement in _PATTERNS)


def is_secret(name: str) -> bool:
    """Whether a field of this name holds a secret, such as `hub_token` or `api_key`."""
    return _IS_NAME.fullmatch(name) is not None


def without_secrets(text: str) -> str:
    """The text with `HIDDEN` in place of every secret that its form or the name before it shows."""
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return text


def command_line(words: Sequence[str]) -> str:
    """The command `hf-extrap` with these words, as it may be published: without secrets and without local folders.

    An absolute path is relative to the current folder if it is inside, and otherwise its last part.
    """
    shown = ["hf-extrap"]
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        of = name or before
        if before.startswith("--") and "=" not in before and not name and is_secret(before):
            shown.append(MASK)
        elif equals and is_secret(of):
            shown.append(f"{name}={MASK}")
        else:
            shown.append(without_secrets(f"{name}{equals}{_relative(value)}"))
    return shlex.join(shown)


def _relative(value: str) -> str:
    if not os.path.isabs(value) or "\n" in value:
        return value
    path, here = Path(os.path.normpath(value)), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name or value
