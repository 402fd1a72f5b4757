"""The site builds without warnings, shows every public name, needs no other site, and its figure is of the package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config

import hf_extrap
from hf_extrap import ExtrapArguments, ExtrapConfig

# Loads of other files; links of the text (a href) go elsewhere and are no loads.
LOADED = re.compile(r'<(?:script|img|iframe|source)[^>]*\bsrc="([^"]+)"|<link[^>]*\bhref="([^"]+)"')


@pytest.fixture(scope="module")
def site(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors: pages outside of the navigation, links, anchors and docstrings."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(repository / "mkdocs.yml"), strict=True, site_dir=str(folder))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def pages_of(entries: list[dict[str, object]]) -> Iterator[str]:
    """The pages of the navigation."""
    for entry in entries:
        for value in entry.values():
            if isinstance(value, str):
                yield value
            else:
                yield from pages_of(value)  # type: ignore[arg-type]


def test_the_navigation_has_every_page(repository: Path, site: Path) -> None:
    # mkdocs.yml has no tag of Python's, so that a plain reader reads it.
    navigation = yaml.safe_load((repository / "mkdocs.yml").read_text())["nav"]
    listed = list(pages_of(navigation))
    written = {str(path.relative_to(repository / "docs")) for path in (repository / "docs").rglob("*.md")}
    assert set(listed) == written and len(listed) == len(written)
    for page in listed:
        assert (site / page).with_suffix(".html").is_file(), page


@pytest.mark.parametrize("name", [name for name in hf_extrap.__all__ if name != "__version__"])
def test_the_api_pages_render_a_public_name(name: str, site: Path) -> None:
    pages = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    assert f'id="hf_extrap.{name}"' in pages


def test_the_api_pages_describe_every_field(site: Path) -> None:
    trainer, optimizer = (site / "api/trainer.html").read_text(), (site / "api/optimizer.html").read_text()
    for name in ExtrapArguments.__annotations__:
        assert f'id="hf_extrap.ExtrapArguments.{name}"' in trainer, name
    # The descriptions that `--help` prints, in place of the calls that make fields.
    assert "Cap of the move as a share of the last step" in trainer and "described(" not in trainer
    for name in ExtrapConfig.__dataclass_fields__:
        assert f'title="hf_extrap.ExtrapConfig.{name}"' in optimizer, name


def test_nothing_is_loaded_from_another_site(site: Path) -> None:
    for path in site.rglob("*.html"):
        for script, link in LOADED.findall(path.read_text()):
            assert not (script or link).startswith(("http:", "https:", "//")), (path.name, script or link)
    for path in site.rglob("*.css"):
        assert "url(http" not in path.read_text() and "@import" not in path.read_text(), path.name


def test_the_search_finds_a_term_without_a_server(site: Path) -> None:
    index = (site / "search/search_index.js").read_text()
    assert index.startswith("var __index = ") and "gradient noise scale" in index
    assert "javascripts/iframe-worker.js" in (site / "index.html").read_text()


@pytest.mark.matrix
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_searches_the_files(site: Path) -> None:
    words = "chromium --headless --no-sandbox --disable-gpu --virtual-time-budget=8000 --dump-dom".split()
    page = subprocess.run([*words, f"file://{site}/index.html?q=noise"], capture_output=True, text=True, timeout=100)
    assert re.search(r"\d+ matching documents", page.stdout) and "<mark" in page.stdout


def test_links_of_the_readme_exist(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (repository / target).exists(), target
    assert 120 <= len(text.splitlines()) <= 160


@pytest.fixture
def figure(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that draws the figure."""
    monkeypatch.syspath_prepend(str(repository / "docs"))
    monkeypatch.delitem(sys.modules, "draw_step", raising=False)
    return import_module("draw_step")


def test_the_figure_is_of_one_step(figure: ModuleType, repository: Path, tmp_path: Path) -> None:
    step = figure.compute()
    at_x = (step.x - figure.MINIMA) @ figure.CURVATURE
    torch.testing.assert_close(step.y, step.x - figure.STEP_SIZE * at_x)
    torch.testing.assert_close(step.gradients, (step.y - figure.MINIMA) @ figure.CURVATURE)
    torch.testing.assert_close(step.x_next, step.x - figure.LEARNING_RATE * step.gradients.mean(0))
    losses = [figure.loss(point, figure.MINIMA.mean(0)).item() for point in (step.x, step.plain, step.x_next)]
    # The numbers below the figure.
    assert [f"{value:.1f}" for value in losses] == ["5.2", "3.1", "1.3"]
    text = (repository / "docs/how_it_works.md").read_text()
    assert "5.2 at x_t, 3.1 after SGD's step and 1.3 after the extrapolated one" in text

    figure.draw(tmp_path / "step.svg")
    drawn, committed = (tmp_path / "step.svg").read_text(), (repository / "docs/figures/step.svg").read_text()
    creator = re.compile(r"Matplotlib v\S+")
    assert drawn.count("<path") == committed.count("<path") > 50
    if creator.findall(drawn) == creator.findall(committed):
        assert drawn == committed
