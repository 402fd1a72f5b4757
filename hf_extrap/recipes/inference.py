"""Texts generated and images classified by a saved model: a run, a checkpoint in it, or any other saved model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BatchEncoding,
    GenerationConfig,
    PreTrainedConfig,
    set_seed,
)

from hf_extrap.recipes.data import load_pretrained
from hf_extrap.recipes.run_folder import RunFolder
from hf_extrap.recipes.task import check_fields
from hf_extrap.training.checkpoints.finding import check_whole
from hf_extrap.training.checkpoints.folders import MANIFEST_FILE
from hf_extrap.training.extras import extra

#: New tokens of a language model whose generation configuration sets no limit.
NEW_TOKENS = 40
#: Files with weights: of Transformers, whole or in shards, and of PEFT.
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*")


@dataclass(frozen=True)
class GenerationOptions:
    """How texts are generated; None keeps the value of the model's own generation configuration.

    Args:
        max_new_tokens: limit of the generated tokens; for language models that set none, 40.
        num_beams: beams of beam search; 1 for greedy decoding.
        length_penalty: exponent of the length in beam search.
        do_sample: draw tokens at random.
        temperature: divides the logits before sampling.
        top_k: sample from that many most likely tokens; 0 for all.
        top_p: sample from the most likely tokens whose probabilities sum to this.
        repetition_penalty: factor on the logits of tokens that have occurred; 1 for none.
        no_repeat_ngram_size: no n-gram of this size occurs twice; 0 for no limit.
        seed: of sampling; None draws other tokens each time.
        batch_size: texts that are generated together.

    Raises:
        ValueError: a value is not allowed, or an option of sampling is given without `do_sample`.
    """

    max_new_tokens: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    seed: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        def holds(name: str, allowed: str, low: float, high: float = float("inf"), above: bool = False) -> Any:
            value = getattr(self, name)
            return value is None or (low < value <= high if above else low <= value <= high), allowed

        check_fields(
            self,
            **{name: holds(name, "at least 1", 1) for name in ("max_new_tokens", "num_beams", "batch_size")},
            **{name: holds(name, "at least 0", 0) for name in ("top_k", "no_repeat_ngram_size")},
            **{name: holds(name, "a number > 0", 0, above=True) for name in ("temperature", "repetition_penalty")},
            length_penalty=holds("length_penalty", "a finite number", -1e9, 1e9),
            top_p=holds("top_p", "(0, 1]", 0, 1, above=True),
            seed=holds("seed", "0 to 2^32 - 1", 0, 2**32 - 1),
        )
        for name in ("temperature", "top_k", "top_p", "seed"):
            check_fields(self, **{name: (bool(self.do_sample) or getattr(self, name) is None, "only with `do_sample`")})
        fits = self.length_penalty is None or (self.num_beams or 2) > 1
        check_fields(self, length_penalty=(fits, "only with `num_beams` above 1"))

    def given(self) -> dict[str, Any]:
        """The fields of a `GenerationConfig` that are not None."""
        fields = asdict(self)
        return {
            name: fields[name] for name in fields if name not in ("seed", "batch_size") and fields[name] is not None
        }


@dataclass(frozen=True)
class Prediction:
    """A class of an image, and its probability in [0, 1]."""

    label: str
    probability: float


def generate(
    checkpoint: str | Path, texts: Sequence[str], options: GenerationOptions | None = None, progress: bool = False
) -> Iterator[str]:
    """Continue texts by a language model, or translate them; in their order, one line for each.

    A language model's line begins with the text. `progress` shows a bar of the batches on stderr if it is a terminal.

    Args:
        checkpoint: the folder of a run, of a checkpoint in it, or of any saved model with its tokenizer.
        texts: for an empty one a language model begins a new text.

    Raises:
        FileNotFoundError: there is no such folder, or no weights or no tokenizer in it.
        ValueError: the model is damaged or of another task, or a text is too long for its positions.
    """
    options = options or GenerationOptions()
    folder, config = _open(checkpoint)
    if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        model = load_pretrained(AutoModelForSeq2SeqLM, str(folder))
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder:
        model = load_pretrained(AutoModelForCausalLM, str(folder))
    else:
        raise ValueError(_other_task(folder, config, "a language model or a translation model", "predict"))
    tokenizer = load_pretrained(AutoTokenizer, str(folder))
    tokenizer.padding_side = "right" if config.is_encoder_decoder else "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if options.seed is not None:
        set_seed(options.seed)
    settings = _settings(model, options)
    for batch in _batches(texts, options.batch_size, progress, "Generating"):
        yield from _generate_batch(_to_device(model), tokenizer, settings, batch)


def _settings(model: Any, options: GenerationOptions) -> GenerationConfig:
    """The model's generation configuration with the options; ValueError if Transformers refuses them together."""
    settings = copy.deepcopy(model.generation_config)
    given = options.given()
    if not model.config.is_encoder_decoder and settings.max_new_tokens is None:
        given.setdefault("max_new_tokens", NEW_TOKENS)
    if "max_new_tokens" in given:
        settings.max_length = None
    settings.update(**given)
    try:
        settings.validate()
    except ValueError as error:
        raise ValueError(f"these options of generation do not fit together: {' '.join(str(error).split())}") from error
    return settings


def _generate_batch(model: Any, tokenizer: Any, settings: GenerationConfig, texts: Sequence[str]) -> Iterator[str]:
    encoded = _encode(model, tokenizer, texts, settings)
    with torch.inference_mode():
        rows = model.generate(**encoded, generation_config=settings).tolist()
    if model.config.is_encoder_decoder:
        for row in tokenizer.batch_decode(rows, skip_special_tokens=True):
            yield _one_line(row)
        return
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    length = encoded["input_ids"].shape[1]
    for text, row in zip(texts, rows, strict=True):
        prompt, whole = ([i for i in ids if i not in ends] for ids in (row[:length], row))
        # Decoded with its beginning: some tokenizers drop the space before the first word.
        continuation = tokenizer.decode(whole)[len(tokenizer.decode(prompt)) :]
        yield _one_line(text + continuation if text else continuation.strip())


def _encode(model: Any, tokenizer: Any, texts: Sequence[str], settings: GenerationConfig) -> BatchEncoding:
    rows = tokenizer(list(texts), verbose=False)["input_ids"]
    if not model.config.is_encoder_decoder:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        rows = [ids or [start] for ids in rows]
    new = 0 if model.config.is_encoder_decoder else settings.max_new_tokens or 0
    positions = getattr(model.config, "max_position_embeddings", None)
    for text, ids in zip(texts, rows, strict=True):
        if positions is not None and len(ids) + new > positions:
            beside = f" and {new} new ones" if new else ""
            raise ValueError(
                f"the text {text:.40}… has {len(ids)} tokens{beside}; allowed: {positions}, the positions of the model."
            )
    return tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(model.device)


def predict(
    checkpoint: str | Path, images: Sequence[str | Path], top_k: int = 1, batch_size: int = 32, progress: bool = False
) -> Iterator[list[Prediction]]:
    """Classify image files; in their order, the `top_k` most likely classes of each, the most likely first.

    Args:
        checkpoint: the folder of a run, of a checkpoint in it, or of any saved model with its image processor.
        images: files that Pillow can read. The saved image processor brings them to the size of the training images.

    Raises:
        FileNotFoundError: there is no such folder, no weights or no image processor in it, or no such image.
        ValueError: the model is damaged or of another task, `top_k` exceeds its classes, or an image cannot be read.
    """
    folder, config = _open(checkpoint)
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(_other_task(folder, config, "an image classifier", "generate"))
    if not 1 <= top_k <= config.num_labels:
        raise ValueError(f"`top_k` is {top_k}; allowed: 1 to {config.num_labels}, the classes of the model.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; allowed: at least 1.")
    model = _to_device(load_pretrained(AutoModelForImageClassification, str(folder)))
    processor = load_pretrained(AutoImageProcessor, str(folder))
    for batch in _batches(images, batch_size, progress, "Classifying"):
        inputs = processor([_read_image(path) for path in batch], return_tensors="pt").to(model.device)
        with torch.inference_mode():
            shares, classes = model(**inputs).logits.float().softmax(-1).topk(top_k)
        for row in zip(classes.tolist(), shares.tolist(), strict=True):
            yield [Prediction(config.id2label[label], share) for label, share in zip(*row, strict=True)]


def _read_image(path: str | Path) -> Any:
    with extra("recipes"):
        from PIL import Image

    if not Path(path).is_file():
        raise FileNotFoundError(f"image {path} does not exist.")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    # Decoders of damaged files raise errors of many types.
    except Exception as error:
        raise ValueError(f"image {path} cannot be read: {' '.join(str(error).split())}.") from error


def _open(checkpoint: str | Path) -> tuple[Path, Any]:
    """The folder, verified if it has a manifest, and its configuration."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint {folder} does not exist.")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        last = RunFolder(folder).last_checkpoint()
        hint = f"; give its last checkpoint, {last}" if last else ""
        raise FileNotFoundError(f"{folder} holds no weights of a model{hint}.")
    if (folder / MANIFEST_FILE).is_file():
        check_whole(folder, "strict")
    return folder, load_pretrained(AutoConfig, str(folder))


def _other_task(folder: Path, config: PreTrainedConfig, allowed: str, command: str) -> str:
    kinds = ", ".join(config.architectures or [config.model_type])
    return f"{folder} holds a model of another task ({kinds}); allowed: {allowed}, or hf-extrap {command}."


def _to_device(model: Any) -> Any:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.to(device or "cpu").eval()


def _batches(items: Sequence[Any], size: int, progress: bool, name: str) -> Iterator[Sequence[Any]]:
    # With disable=None the bar is shown on terminals only.
    starts = range(0, len(items), size)
    for start in tqdm(starts, desc=name, leave=False, disable=None if progress and len(starts) > 1 else True):
        yield items[start : start + size]


def _one_line(text: str) -> str:
    return " ".join(text.split("\n")).strip("\r")
