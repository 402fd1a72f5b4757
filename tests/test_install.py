"""The built wheel, installed without extras, runs the README's first snippet with its requirements alone."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

from tests.test_layers import REQUIRED, run_with_only


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources: building writes beside them."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=repository, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("the sources are not a git checkout")
    for name in names.stdout.split("\0"):
        if name.startswith("hf_extrap/") or name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((repository / name).read_bytes())
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", str(out), str(source)], check=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_has_the_licence_types_and_templates(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [name for name in names if name.endswith("METADATA")]
        fields = Parser().parsestr(archive.read(metadata).decode())
    assert {"hf_extrap/py.typed", "hf_extrap/recipes/templates/model_card.md"} <= names
    assert not any(name.startswith(("tests", "configs", "examples")) for name in names)
    assert fields["License-Expression"] == "Apache-2.0" and any(name.endswith("licenses/LICENSE") for name in names)
    assert {"recipes", "lab", "deepspeed", "trl", "test"} <= set(fields.get_all("Provides-Extra") or ())


def test_the_readmes_first_snippet_runs_in_the_wheel(wheel: Path, repository: Path, tmp_path: Path) -> None:
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", "--target", str(tmp_path / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    (diff, *_) = re.findall(r"```diff\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)
    snippet = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
    code = f"""
sys.path.insert(0, {str(tmp_path / "site")!r})
import os; os.chdir({str(tmp_path)!r})
import hf_extrap
assert hf_extrap.__file__.startswith({str(tmp_path / "site")!r}), hf_extrap.__file__
from transformers import GPT2Config, GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1))
dataset = [{{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}}] * 16
{snippet}
print(trainer.state.global_step, trainer.extrapolated.config.direction)
"""
    done = run_with_only(REQUIRED, code)
    assert done.stdout.splitlines()[-1:] == ["6 past_gradient"], done.stdout + done.stderr


def test_the_citation_names_the_paper_and_the_version(repository: Path) -> None:
    import hf_extrap

    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and citation["license"] == "Apache-2.0"
    assert citation["version"] == hf_extrap.__version__
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Lin", "Kong", "Stich", "Jaggi"]
    assert paper["year"] == 2020 and paper["title"] == "Extrapolation for Large-batch Training in Deep Learning"
    assert f"## [{hf_extrap.__version__}]" in (repository / "CHANGELOG.md").read_text()
