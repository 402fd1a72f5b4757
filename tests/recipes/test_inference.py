"""Generating texts and classifying images by saved models: equal to the model itself, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_extrap.recipes.image_classification.images import builtin_digits
from hf_extrap.recipes.inference import GenerationOptions, Prediction, generate, predict

TEXTS = ["the value", "a", "an object of the class is not a statement", ""]


def test_a_language_model_continues_texts_as_one_by_one(task_runs: Path) -> None:
    run = task_runs / "language_modeling"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    options = GenerationOptions(max_new_tokens=7, num_beams=1, batch_size=3)
    lines = list(generate(run, TEXTS, options))
    assert len(lines) == len(TEXTS)
    for text, line in zip(TEXTS, lines, strict=True):
        start = tokenizer(text)["input_ids"] or [tokenizer.eos_token_id]
        row = model.generate(torch.tensor([start]), max_new_tokens=7, do_sample=False)[0, len(start) :].tolist()
        words = [tokenizer.decode([token]).strip() for token in row if token != tokenizer.eos_token_id]
        assert line.split() == [*text.split(), *words]
    # A checkpoint in the run's folder is a model as well.
    assert len(list(generate(run / "checkpoint-3", TEXTS[:1], options))) == 1


def test_other_causal_models_of_limited_positions(task_runs: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(task_runs / "language_modeling")
    torch.manual_seed(0)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    sizes = {"vocab_size": len(tokenizer), "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=1.0, **ends)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = GenerationOptions(max_new_tokens=4)
    lines = list(generate(tmp_path, TEXTS[:3], options))
    # Padding on the left changes nothing.
    assert lines == [line for text in TEXTS[:3] for line in generate(tmp_path, [text], options)]
    assert [len(line.split()) > len(text.split()) for text, line in zip(TEXTS, lines, strict=False)] == [True] * 3
    sentence = "has 13 tokens and 4 new ones; allowed: 16, the positions of the model."
    with pytest.raises(ValueError, match=sentence):
        list(generate(tmp_path, ["the " * 13], options))


def test_sampling_is_repeated_by_its_seed(task_runs: Path) -> None:
    def sample(seed: int, **fields: Any) -> list[str]:
        options = GenerationOptions(do_sample=True, temperature=2.0, max_new_tokens=12, seed=seed, **fields)
        return list(generate(task_runs / "language_modeling", ["the"] * 3, options))

    assert sample(1) == sample(1) != sample(2)
    assert len(set(sample(1))) > 1
    # The most likely token alone is greedy decoding.
    greedy = list(generate(task_runs / "language_modeling", ["the"] * 3, GenerationOptions(max_new_tokens=12)))
    assert sample(1, top_k=1) == greedy and len(set(greedy)) == 1


def test_a_translation_model_translates_with_its_own_beams(task_runs: Path) -> None:
    run = task_runs / "translation"
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    assert model.generation_config.num_beams == 2
    texts = ["two days", "Monday", "the first of January"]

    def expected(**options: Any) -> list[str]:
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        decoded = tokenizer.batch_decode(model.generate(**inputs, **options), skip_special_tokens=True)
        return [" ".join(text.split("\n")) for text in decoded]

    assert list(generate(run, texts, GenerationOptions(max_new_tokens=6))) == expected(max_new_tokens=6)
    options = {"num_beams": 3, "length_penalty": 2.0, "max_new_tokens": 9, "no_repeat_ngram_size": 2}
    assert list(generate(run, texts, GenerationOptions(**options))) == expected(**options)


def test_images_are_classified_as_by_the_evaluation(task_runs: Path, tmp_path: Path) -> None:
    run, images = task_runs / "image_classification", builtin_digits()["test"][:5]["img"]
    paths = []
    for number, image in enumerate(images):
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1])
    model = AutoModelForImageClassification.from_pretrained(run).eval()
    pixels = np.stack([np.asarray(image.convert("RGB")).transpose(2, 0, 1) for image in images])
    with torch.no_grad():
        shares = model(pixel_values=torch.from_numpy(pixels)).logits.softmax(-1)
    found = list(predict(run, paths, top_k=10, batch_size=2))
    assert [[one.label for one in row] for row in found] == [
        [str(label) for label in row] for row in shares.argsort(descending=True).tolist()
    ]
    probabilities = torch.tensor([[one.probability for one in row] for row in found])
    torch.testing.assert_close(probabilities, shares.sort(descending=True).values, rtol=1e-5, atol=1e-7)
    # Another size and mode of the same image.
    large = images[0].convert("L").resize((24, 24))
    large.save(tmp_path / "large.gif")
    ((one,),) = predict(run, [tmp_path / "large.gif"])
    assert isinstance(one, Prediction) and 0 < one.probability <= 1


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_beams": 0}, "`num_beams` is 0; allowed: at least 1."),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0; allowed: at least 1."),
        ({"do_sample": True, "temperature": 0.0}, "`temperature` is 0.0; allowed: a number > 0."),
        ({"do_sample": True, "temperature": float("nan")}, "`temperature` is nan; allowed: a number > 0."),
        ({"do_sample": True, "top_p": 1.5}, "`top_p` is 1.5; allowed: (0, 1]."),
        ({"do_sample": True, "top_k": -1}, "`top_k` is -1; allowed: at least 0."),
        ({"top_k": 5}, "`top_k` is 5; allowed: only with `do_sample`."),
        ({"seed": 5}, "`seed` is 5; allowed: only with `do_sample`."),
        ({"num_beams": 1, "length_penalty": 2.0}, "`length_penalty` is 2.0; allowed: only with `num_beams` above 1."),
        ({"batch_size": 0}, "`batch_size` is 0; allowed: at least 1."),
    ],
)
def test_options_that_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        GenerationOptions(**fields)
    assert str(error.value) == sentence


def test_folders_and_images_that_are_refused(task_runs: Path, tmp_path: Path) -> None:
    def error_of(function: Any, *words: Any, **options: Any) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            list(function(*words, **options))
        return str(error.value)

    text, images = task_runs / "language_modeling", task_runs / "image_classification"
    assert error_of(generate, tmp_path / "no", ["a"]) == f"checkpoint {tmp_path / 'no'} does not exist."
    assert "holds a model of another task (ExtrapResNetForImageClassification)" in error_of(generate, images, ["a"])
    assert "holds a model of another task (ExtrapLstmForCausalLM)" in error_of(predict, text, ["a.png"])
    unsaved = tmp_path / "unsaved"
    shutil.copytree(text / "checkpoint-3", unsaved / "checkpoint-3")
    hint = f"{unsaved} holds no weights of a model; give its last checkpoint, {unsaved / 'checkpoint-3'}."
    assert error_of(generate, unsaved, ["a"]) == hint
    (unsaved / "checkpoint-3" / "config.json").write_text("{}")
    assert "config.json" in error_of(generate, unsaved / "checkpoint-3", ["a"])
    (tmp_path / "x.png").write_bytes(b"no image")
    assert "x.png cannot be read" in error_of(predict, images, [tmp_path / "x.png"])
    assert error_of(predict, images, [tmp_path / "y.png"]) == f"image {tmp_path / 'y.png'} does not exist."
    sentence = "`top_k` is 11; allowed: 1 to 10, the classes of the model."
    assert error_of(predict, images, [tmp_path / "x.png"], top_k=11) == sentence
    long = "a " * 2000
    assert "tokens; allowed: 1024, the positions of the model." in error_of(generate, task_runs / "translation", [long])


def test_the_code_that_a_model_carries_is_not_run(task_runs: Path, tmp_path: Path) -> None:
    shutil.copytree(task_runs / "language_modeling", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    (tmp_path / "run" / "lstm.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert len(list(generate(tmp_path / "run", ["the"], GenerationOptions(max_new_tokens=2)))) == 1
    # An architecture that is not registered needs its code, and is refused.
    config = (tmp_path / "run" / "config.json").read_text().replace('"extrap_lstm"', '"unknown"')
    (tmp_path / "run" / "config.json").write_text(config)
    with pytest.raises(ValueError, match="custom code"):
        list(generate(tmp_path / "run", ["the"]))
    assert not (tmp_path / "ran").exists()


def test_a_bar_is_shown_on_a_terminal_alone(
    task_runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown() -> str:
        capsys.readouterr()
        options = GenerationOptions(max_new_tokens=1, batch_size=1)
        assert len(list(generate(task_runs / "language_modeling", ["the", "a"], options, progress=True))) == 2
        return capsys.readouterr().err

    assert "Generating" not in shown()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert "Generating" in shown()
