"""Texts of users in model cards, reports and tables stay text."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from rich.console import Console

from hf_extrap.recipes.baseline import Baseline
from hf_extrap.recipes.model_card import make_card
from hf_extrap.recipes.models import ExtrapResNetConfig, ExtrapResNetForImageClassification
from hf_extrap.recipes.tables import make_table
from hf_extrap.training.markdown import code, code_block, escaped

NASTY = [
    "x](javascript:alert(1))",
    "<script>alert(1)</script>",
    "a\n---\nlicense: mit\n---\nb",
    "{{ 7 * 7 }} {% raw %}",
    "a | b `c` ``` d",
    "[link]: <x>",
    "# heading",
    "![x](http://host/x.png)",
    "\x1b[31mred\x00",
    "tag: !!python/object:os.system",
    "long " * 200,
]

METRICS: dict[str, Any] = {
    **{"task": "image_classification", "preset": "extrap", "metric": "accuracy", "status": "finished"},
    **{"untrained": None, "eval": {"eval_accuracy": 12.5, "eval_loss": 1.0}, "test": None},
    **{"world_size": 1, "virtual_workers": 1, "global_batch": 4, "global_batch_units": 4, "optimizer": "SGD"},
    **{"peak_learning_rate": 0.1, "steps": 1, "epochs": 1.0, "seconds_per_step": 1.0, "data_seconds_per_step": None},
    **{"tokens_per_second": None, "samples_per_second": 4.0, "train_seconds": 1.0, "seed": 1},
    **{"extrap": {"direction": "none"}, "versions": {"torch": "2"}, "arguments": {}, "command": "hf-extrap train"},
}


@pytest.mark.parametrize("name", NASTY)
def test_a_model_card_keeps_its_structure(name: str) -> None:
    model = ExtrapResNetForImageClassification(ExtrapResNetConfig(depth=8, width=4))

    def card_of(text: str) -> ModelCard:
        facts = {"dataset": text, "source_lang": text, "note": text}
        arguments = {"data_dir": text, "license": text, "learning_rate": 0.2}
        own = {**METRICS, "facts": facts, "arguments": arguments, "command": f"hf-extrap train --x {text!s}"}
        return make_card(own, model, None, Baseline(text, {**own, "arguments": {"x": text}}, ["learning_rate", "x"]))

    card, plain = card_of(name), card_of("harmless")
    read = ModelCard(card.content)
    assert set(read.data.to_dict()) == set(plain.data.to_dict())
    assert read.data.eval_results[0].metric_value == 12.5
    front = card.content.split("\n---\n")[0].removeprefix("---\n")
    assert set(yaml.safe_load(front)) == set(yaml.safe_load(plain.content.split("\n---\n")[0].removeprefix("---\n")))
    # Outside of the blocks with code, commands and fields, what is special is escaped.
    found = re.compile(r"^(`{3,})(\w+)\n(.*?)\n\1$", re.MULTILINE | re.DOTALL)
    blocks = [(block[2], block[3]) for block in found.finditer(card.content)]
    assert [language for language, _ in blocks] == ["python", "bash", "bash", "yaml", "yaml", "bibtex"]
    assert blocks[2][1] == f"hf-extrap train --x {name}".replace("\r", "")
    assert yaml.safe_load(blocks[3][1])["license"] == name
    outside = found.sub("", card.content).split("\n---\n", 1)[1]
    body = re.sub(r"\\[^\w\s]|(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)
    for special in ("](javascript", "<script", "{{", "![x]", "```\x20d", "\x1b"):
        assert special not in body
    headings = [line for line in body.splitlines() if line.startswith("#")]
    expected = [line for line in found.sub("", plain.content).splitlines() if line.startswith("#")]
    assert headings[1:] == expected[1:] and len(headings) == len(expected)
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert all(line.count("|") in (3, 4) for line in rows)


def test_escaping() -> None:
    assert escaped("a|b [c](d) <e> `f`") == "a\\|b \\[c\\](d) \\<e\\> \\`f\\`"
    assert escaped("cifar10_small v1.0-rc") == "cifar10_small v1.0-rc"
    assert code("a `b` c") == "`` a `b` c ``" and code("a b") == "`a b`"
    assert code_block("x ``` y", "bash") == "````bash\nx ``` y\n````"


@pytest.mark.parametrize("name", ["[/red]", "[bold]x", *NASTY])
def test_tables_on_the_terminal_print_markup_as_text(name: str) -> None:
    console = Console(file=io.StringIO(), width=2000)
    console.print(make_table(name, ["one", name], [[name, name]]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count(name.split("\n")[0].split("\x1b")[0].strip() or "red") >= 1
