"""The notebook runs, trains, and is committed without outputs."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


@pytest.mark.matrix
def test_the_quick_start(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(repository / "examples/quick_start.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None and not cell.outputs for cell in code)
    # The backend of notebooks, for figures inline; and no files of the user's.
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    figure, numbers = code[-2].outputs[-1], code[-1].outputs[-1]
    assert "image/png" in figure["data"]
    share, *perplexities = numbers["text"].splitlines()
    shortest, longest = (float(number) for number in re.findall(r"\d\.\d\d", share))
    # A tenth of the last step, which the warm-up makes larger than the one before.
    assert 0.05 < shortest < longest < 0.5
    # A uniform guess has a perplexity of thousands, and word frequencies alone of about 106.
    assert [line.split(":")[0] for line in perplexities] == ["none", "extrap-past"]
    assert all(float(line.split(": ")[1]) < 100 for line in perplexities), perplexities
