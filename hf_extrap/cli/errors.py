"""Errors that the user can correct, each as one sentence that suggests the nearest word for a mistyped one."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Sequence
from typing import Any

from typer.exceptions import TyperException

#: Parts of the messages of libraries whose errors have no type of their own.
OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUDA out of memory")
UNWRITTEN = ("inline_container.cc", "PytorchStreamWriter", "basic_ios::clear", "os error 27", "os error 28")
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
#: A value and the allowed ones: this package's form, the tasks' and argparse's.
REFUSED = re.compile(
    r"(?:(?<=is )(?='[^' ]+'; allowed)|(?='[^' ]+'(?: is unknown|: choose one of|:? \(choose from)))'([^' ]+)'.*",
    re.DOTALL,
)


def sentence_of(error: Exception, program: Any, words: Sequence[str]) -> str | None:
    """The message of an error that the user can correct, on one line; None for any other error.

    `program` is the Typer program that was run with `words`: a field that is unknown may be one of its options.
    """
    if isinstance(error, TyperException):
        return _of_typer(error)
    # `in FOLDER`, for an error that names no file.
    place = " ".join(getattr(error, "__notes__", ()))
    if isinstance(error, OSError) and error.strerror:
        if error.errno in FULL and place:
            # The file that is named may be the one that was copied.
            return f"{place}: {error.strerror}."
        return ": ".join(str(part) for part in (error.filename or place, f"{error.strerror}.") if part)
    sentence = " ".join(str(error).split()).removesuffix(".") + "."
    if any(sign in sentence for sign in OUT_OF_MEMORY):
        return f"there is not enough memory: {sentence}"
    if any(sign in sentence for sign in UNWRITTEN):
        return f"{' '.join(filter(None, ('a file', place)))} cannot be written, as on a full disk: {sentence}"
    # By name, because importing these libraries takes longer than parsing the command line.
    named = {"YAMLError", "SafetensorError"} & {kind.__name__ for kind in type(error).__mro__}
    if not (named or isinstance(error, (ValueError, OSError, ModuleNotFoundError, MemoryError))):
        return None
    if field := getattr(error, "unknown_field", None):
        options = program.commands[words[0]].params if words[0] in program.commands else ()
        names = [name.lstrip("-") for option in options for name in option.opts if name.startswith("--")]
        if close := nearest(field, names, cutoff=0.75):
            return f"unknown option --{field} (did you mean --{close}?)."
    return _with_suggestion(sentence)


def nearest(word: str, allowed: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The allowed word that is most like a mistyped one, or None."""
    return next(iter(difflib.get_close_matches(word, list(allowed), n=1, cutoff=cutoff)), None)


def _of_typer(error: TyperException) -> str:
    """A sentence without a capital, with the suggestion in brackets."""
    text = " ".join(error.format_message().split())
    text = re.sub(r"\.? Did you mean (.*)\?$", r" (did you mean \1?)", text)
    text = re.sub(r"\(Possible options: (.*)\)$", r"(did you mean \1?)", text)
    text = re.sub(r"^Missing command\.$", "No command is given; `hf-extrap --help` lists them.", text)
    return f"{text[:1].lower()}{text[1:].removesuffix('.')}."


def _with_suggestion(sentence: str) -> str:
    """Add the allowed value that is nearest to the refused one, if the sentence names both."""
    if "did you mean" in sentence or not (found := REFUSED.search(sentence)):
        return sentence
    words = re.findall(r"[\w.@+-]+", found[0][len(found[1]) + 2 :].rpartition("allowed:")[2])
    allowed = [word.rstrip(".") for word in words]
    close = nearest(found[1], allowed)
    if close is None or found[1] in allowed:
        return sentence
    # Argparse lists dozens of optimizers.
    shorter = re.sub(r" \(choose from .*\)\.?$", "", sentence) if len(sentence) > 200 else sentence
    return f"{shorter.removesuffix('.')} (did you mean {close!r}?)."
