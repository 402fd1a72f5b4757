"""The LSTM as a Transformers model: state, labels, generation, saving, Auto classes, pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline, set_seed

from hf_extrap.recipes.language_modeling.text import word_level_tokenizer
from hf_extrap.recipes.models import ExtrapLstmConfig, ExtrapLstmForCausalLM, ExtrapLstmModel

VOCABULARY = 30


def make_model(**overrides: object) -> ExtrapLstmForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "embedding_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "dropout": 0.0}
    # A wide range, so that a wrong state changes the generated tokens.
    config = ExtrapLstmConfig(**{**shape, "initializer_range": 2.0, "eos_token_id": 1, "pad_token_id": 1, **overrides})
    return ExtrapLstmForCausalLM(config).eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def test_loss_is_shifted_inside_and_equals_naive() -> None:
    model, ids = make_model(), tokens(3, 8)
    labels = ids.clone()
    labels[0, 5:] = -100
    output = model(input_ids=ids, labels=labels)
    expected = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)
    assert output.logits is None
    assert output.token_losses.shape == (3, 7)
    own = torch.autograd.grad(output.loss, list(model.parameters()))
    for mine, naive in zip(own, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(mine, naive, atol=1e-5, rtol=1e-5)


def test_the_state_is_carried_and_ignores_padding() -> None:
    model, ids = make_model(), tokens(2, 13)
    whole = model(input_ids=ids, labels=ids).token_losses
    parts, state = [], None
    for start in (0, 4, 8):
        chunk = ids[:, start : start + 5]
        output = model(input_ids=chunk, labels=chunk, cache_params=state)
        state = output.cache_params
        parts.append(output.token_losses)
    assert state[0].shape == state[1].shape == (2, 2, 16)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    ids = tokens(1, 5)
    alone = model(input_ids=ids)
    padded = torch.cat([torch.ones(1, 3, dtype=torch.long), ids, torch.ones(1, 2, dtype=torch.long)], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 0, 0]])
    among = model(input_ids=torch.cat([padded, tokens(1, 10)]), attention_mask=torch.cat([mask, torch.ones(1, 10)]))
    torch.testing.assert_close(among.logits[:1, 3:8], alone.logits)
    for own, expected in zip(among.cache_params, alone.cache_params, strict=True):
        torch.testing.assert_close(own[:, :1], expected)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"num_beams": 2, "do_sample": True}]
)
def test_generate_with_and_without_cache(options: dict[str, object]) -> None:
    model, ids = make_model(), tokens(2, 4)
    generated = []
    for use_cache in (True, False):
        set_seed(0)
        generated.append(model.generate(ids, max_new_tokens=12, use_cache=use_cache, **options))
    assert torch.equal(generated[0], generated[1])
    assert generated[0].shape[1] > 4


def test_cache_is_used_and_each_step_reads_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = make_model(eos_token_id=None), []
    read = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **kw: lengths.append(kw["input_ids"].shape[1]) or read(**kw))
    model.generate(tokens(1, 6), max_new_tokens=3, do_sample=False)
    assert lengths == [6, 1, 1]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_left_padded_batch_generates_what_each_prompt_does_alone(num_beams: int) -> None:
    model = make_model(eos_token_id=None)
    long, short = tokens(1, 6), tokens(1, 3) - 1
    batch = torch.cat([long, torch.cat([torch.ones(1, 3, dtype=torch.long), short], 1)])
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": num_beams, "pad_token_id": 1}
    together = model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(together[0], model.generate(long, **options)[0])
    assert torch.equal(together[1, 3:], model.generate(short, **options)[0])


@pytest.mark.parametrize("tied", [True, False])
def test_auto_classes_tied_weights_and_pipeline(tmp_path: Path, tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embeddings.weight) is tied
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "extrap_lstm"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is ExtrapLstmForCausalLM
    assert (loaded.lm_head.weight is loaded.model.embeddings.weight) is tied
    ids = tokens(2, 5)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    tokenizer = word_level_tokenizer({"train": [{"text": " ".join(f"w{i}" for i in range(2, VOCABULARY))}]})
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path))
    words = generator("w3 w4", max_new_tokens=5, do_sample=False)[0]["generated_text"].split(" ")
    expected = model.generate(tokenizer("w3 w4", return_tensors="pt").input_ids, max_new_tokens=5, do_sample=False)
    assert words == tokenizer.convert_ids_to_tokens([i for i in expected[0].tolist() if i != 1])
    assert words[:2] == ["w3", "w4"]
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert type(base) is ExtrapLstmModel
    assert torch.equal(base(input_ids=ids).last_hidden_state, model.model(input_ids=ids).last_hidden_state)


def test_parameter_count_and_embeddings_of_inputs() -> None:
    large = ExtrapLstmForCausalLM(ExtrapLstmConfig(embedding_size=200, hidden_size=200, num_hidden_layers=2))
    assert large.num_parameters() == 33278 * 200 + 33278 + 2 * (4 * 200 * 400 + 8 * 200)
    model, ids = make_model(), tokens(2, 5)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(input_ids=ids).logits)
    assert torch.equal(model(input_ids=ids, logits_to_keep=2).logits, model(input_ids=ids).logits[:, -2:])


def test_bad_configurations_and_inputs_are_refused() -> None:
    for fields, message in (
        ({"hidden_size": 0, "embedding_size": 0}, "at least 1"),
        ({"dropout": 1.0}, r"allowed: \[0, 1\)"),
        ({"embedding_size": 8, "hidden_size": 16}, "with tied embeddings"),
    ):
        with pytest.raises(ValueError, match=message):
            ExtrapLstmConfig(**fields)
    with pytest.raises(ValueError, match="allowed: equal shapes"):
        make_model()(input_ids=tokens(2, 5), labels=tokens(2, 4))
    with pytest.raises(ValueError, match="exactly one"):
        make_model()()
