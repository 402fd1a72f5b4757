"""hf-extrap watch: a local page with the curves of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .imports import importing


def watch(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR ...", help="Runs, or folders that hold runs.")],
    port: Annotated[int, typer.Option("--port", help="Port on 127.0.0.1; 0 for a free one.")] = 0,
    no_browser: Annotated[bool, typer.Option("--no_browser", help="Print the address, and open nothing.")] = False,
) -> int:
    """Show finished and running runs on a local page.

    The page follows running runs. It is on the loopback interface alone, and its address holds a token.

    \b
    Example:
      hf-extrap watch runs --no_browser
    """
    with importing():
        from hf_extrap.lab.watch.page import watch as serve

    serve(folders, port, open_browser=not no_browser)
    return 0
