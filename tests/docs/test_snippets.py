"""Every code block of the site and of the README runs, or at least resolves; each page is one namespace."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from unittest import SkipTest

import pytest
from accelerate.state import AcceleratorState, GradientState
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from hf_extrap.cli import main
from hf_extrap.optim.yaml_text import read_yaml
from hf_extrap.recipes.configuration import resolve

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCKS = re.compile(r"^```(python|bash|yaml|diff)$", re.MULTILINE)
WITH_BLOCKS = [path for path in PAGES if BLOCKS.search(path.read_text())]

SKIPPED = {"docs/engines.md": 2, "docs/models.md": 1}
"""Python blocks that cannot run here: DeepSpeed's engine, a quotation of torch, and a model on the Hub."""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory with links to what commands name."""
    for name in ("configs", "examples", "tests", "Makefile", "setup.cfg"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@dataclass
class CommandLines:
    """Checks the commands of bash blocks without running them."""

    help_of: Callable[[str], str]

    def __call__(self, example: Example) -> None:
        for line in example.parsed.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                while words and "=" in words[0]:
                    words.pop(0)
                if words:
                    self.check(words[0].removeprefix(".venv/bin/"), words[1:])

    def check(self, program: str, words: list[str]) -> None:
        if program == "make":
            targets = re.findall(r"^([\w-]+):", Path("Makefile").read_text(), re.MULTILINE)
            assert {word for word in words if "=" not in word} <= set(targets), words
        elif program == "pip":
            self.check_extras(words)
        elif program == "pytest":
            assert all(Path(word).exists() for word in words if not word.startswith("-")), words
        elif program == "hf-extrap":
            self.check_command(words)
        elif program in ("torchrun", "accelerate", "python"):
            if "--config_file" in words:
                assert Path(words[words.index("--config_file") + 1]).is_file(), words
            if "-m" in words:
                module, rest = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
                assert importlib.util.find_spec(module) is not None, module
                if module == "hf_extrap":
                    self.check_command(rest)
            else:
                assert any(Path(word).is_file() for word in words if word.endswith(".py")), words
        else:
            pytest.fail(f"no check of the command {program!r}")

    def check_extras(self, words: list[str]) -> None:
        settings = configparser.ConfigParser()
        settings.read("setup.cfg")
        named = {name for word in words for part in re.findall(r"\[([\w,]+)\]", word) for name in part.split(",")}
        assert words[0] == "install" and named <= set(settings["options.extras_require"]), words

    def check_command(self, words: list[str]) -> None:
        """Options are those of the command's help; for commands that train, others are fields of a run."""
        name, *rest = words
        path = rest.pop(0) if name in ("train", "compare") and rest and not rest[0].startswith("-") else None
        if name in ("train", "compare"):
            known = set() if name == "train" else set(re.findall(r"--\w+", self.help_of(name)))
            fields: list[str] = []
            while rest:
                word = rest.pop(0)
                if word not in known:
                    fields.append(word)
                elif rest and not rest[0].startswith("--"):
                    rest.pop(0)
            resolve(path, [word for word in fields if word not in ("--help", "-h", "--dry_run")])
            return
        if name == "init":
            # Later commands take what it writes.
            (folder := Path(rest[0])).mkdir(exist_ok=True)
            for split in ("train", "validation", "test"):
                (folder / f"{split}.txt").write_text("some words\n" * 40)
            assert main(words) == 0
            return
        printed = self.help_of(name)
        for word in rest:
            if word.startswith("--"):
                assert word.split("=")[0] in printed, f"hf-extrap {name} has no {word}"
            elif word.endswith((".yaml", ".json")):
                assert Path(word).is_file(), word


def check_yaml(example: Example) -> None:
    """A mapping with a task is a recipe."""
    content = read_yaml(example.parsed, "the block")
    if isinstance(content, dict) and "task" in content:
        Path("block.yaml").write_text(example.parsed)
        resolve("block.yaml")


def check_diff(example: Example) -> None:
    """Both sides of a diff are Python."""
    lines = example.parsed.splitlines()
    assert all(line[:1] in ("+", "-", " ", "") for line in lines)
    for side in "+-":
        ast.parse(dedent("\n".join(line[1:] for line in lines if line[:1] in (side, " ", ""))))


@pytest.mark.parametrize("path", WITH_BLOCKS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_the_blocks_of_a_page(
    path: Path, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def help_of(command: str) -> str:
        capsys.readouterr()
        try:
            main([command, "--help"])
        except SystemExit as leaving:
            assert not leaving.code
        return capsys.readouterr().out

    parsers = [
        SkipParser(),
        PythonCodeBlockParser(),
        CodeBlockParser("bash", CommandLines(help_of)),
        CodeBlockParser("yaml", check_yaml),
        CodeBlockParser("diff", check_diff),
    ]
    document, skipped = Document.parse(str(path), *parsers), []
    # A module, so that the classes of a page can be pickled.
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    document.namespace = vars(page)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for example in document.examples():
            try:
                example.evaluate()
            except SkipTest as reason:
                skipped.append(str(reason))
    assert len(skipped) == SKIPPED.get(str(path.relative_to(REPOSITORY)), 0), skipped
    assert all(skipped) and os.getcwd() == str(workplace)


def test_every_block_has_a_language() -> None:
    """So that none escapes the tests by having no name."""
    for path in PAGES:
        fences = re.findall(r"^```(.*)$", path.read_text(), re.MULTILINE)
        assert len(fences) % 2 == 0, path
        assert {name for name in fences[::2]} <= {"python", "bash", "yaml", "diff", "text", "bibtex"}, (path, fences)
