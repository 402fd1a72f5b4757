"""Translation: sentence pairs, a Transformer, batches counted in tokens, and BLEU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import tokenizers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from hf_extrap.recipes.data import DataArguments, cached_folder, content_fingerprint, load_pretrained
from hf_extrap.recipes.task import PreparedTask, check_fields, parameter_count
from hf_extrap.recipes.translation.sentence_pairs import sentence_pairs
from hf_extrap.recipes.translation.subwords import train_bpe
from hf_extrap.recipes.translation.token_batches import FullBatches, TokenBatches, UnwrappingCollator
from hf_extrap.training.arguments import described
from hf_extrap.training.extras import extra

with extra("recipes"):
    import datasets

#: Increase it when the format of prepared data changes.
CACHE_VERSION = 1
#: Positions of a new model, in tokens: references are never truncated.
LONGEST_REFERENCE = 1024


@dataclass
class TranslationArguments(DataArguments):
    """Fields of the task `translation`: languages, batches, generation, and a new model."""

    source_lang: str = described("en", "Key of the source sentences in the data.")
    target_lang: str = described("de", "Key of the target sentences in the data.")
    vocab_size: int = described(8000, "Tokens of the joint byte-level BPE.")
    max_length: int = described(128, "Limit in tokens of sources and training targets; longer ones are truncated.")
    batch_tokens: int = described(4096, "Limit of a worker's training batch, in tokens of one side with padding.")
    num_beams: int = described(5, "Beams of the final evaluation on the test split.")
    length_penalty: float = described(1.0, "Exponent of the length in beam search.")
    d_model: int = described(512, "Width of a new model.")
    encoder_layers: int = described(6, "Encoder layers of a new model.")
    decoder_layers: int = described(6, "Decoder layers of a new model.")
    attention_heads: int = described(8, "Attention heads of a new model.")
    ffn_dim: int = described(2048, "Inner width of the feed-forward layers.")
    dropout: float = described(0.1, "Dropout of a new model.")
    attention_dropout: float = described(0.0, "Dropout of the attention weights.")
    activation_dropout: float = described(0.0, "Dropout inside the feed-forward layers.")
    attn_implementation: str | None = described(
        None, "Attention kernel, such as eager or sdpa; default: the model's choice."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source_lang == self.target_lang:
            raise ValueError(f"`source_lang` and `target_lang` are both {self.source_lang!r}; allowed: two languages.")
        least = dict.fromkeys(("num_beams", "encoder_layers", "decoder_layers", "attention_heads", "ffn_dim"), 1)
        least |= {"max_length": 2, "batch_tokens": self.max_length}
        shares = ("dropout", "attention_dropout", "activation_dropout")
        heads, divides = self.attention_heads, self.attention_heads >= 1 and self.d_model % self.attention_heads == 0
        check_fields(
            self,
            **{name: (getattr(self, name) >= count, f"at least {count}") for name, count in least.items()},
            d_model=(self.d_model >= 1 and divides, f"multiples of `attention_heads`, {heads}"),
            **{name: (0.0 <= getattr(self, name) < 1.0, "[0, 1)") for name in shares},
        )


class TranslationTask:
    """Trains a translation model on sentence pairs and scores it with BLEU."""

    name: ClassVar[str] = "translation"
    arguments_class: ClassVar[type] = TranslationArguments
    seq2seq: ClassVar[bool] = True

    def training_defaults(self) -> dict[str, Any]:
        """Return defaults for batches counted in tokens and for BLEU; with `predict_with_generate` false, for the loss.

        Evaluations during training decode greedily (`generation_num_beams=1`); the final one uses `num_beams`.
        """
        return {
            "predict_with_generate": True,
            "generation_num_beams": 1,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 64,
            "remove_unused_columns": False,
            "label_smoothing_factor": 0.1,
            "metric_for_best_model": "bleu",
        }

    def prepare(self, arguments: TranslationArguments, training_arguments: TrainingArguments) -> PreparedTask:
        """Load and encode the pairs (main process first), and build model, collator and metrics."""
        generates = getattr(training_arguments, "predict_with_generate", False)
        if generates:
            from hf_extrap.recipes.translation.bleu import TranslationMetrics, bleu_signature
        if training_arguments.train_batch_size != 1:
            raise ValueError(
                f"per_device_train_batch_size times devices per process is {training_arguments.train_batch_size}; "
                "allowed: 1, as one item is a whole batch of `batch_tokens`."
            )
        with training_arguments.main_process_first(desc="translation data"):
            splits = sentence_pairs(arguments, arguments.source_lang, arguments.target_lang)
            tokenizer, encoded, counts = encode(splits, arguments)
        model = build_model(arguments, tokenizer)
        # A whole split is much faster to read than its rows.
        examples = {name: split.to_list() for name, split in encoded.items()}
        longest = max(len(row["labels"]) for name in ("validation", "test") for row in examples[name])
        positions = getattr(model.config, "max_position_embeddings", longest)
        if longest > positions:
            raise ValueError(
                f"a reference has {longest} tokens; allowed: at most {positions}, the positions of the model."
            )

        train = TokenBatches(examples["train"], arguments.batch_tokens, training_arguments.seed)
        evaluation, test = (
            FullBatches(examples[name], training_arguments.eval_batch_size, training_arguments.world_size)
            for name in ("validation", "test")
        )
        references = {
            tuple(row["labels"]): text
            for name in ("validation", "test")
            for row, text in zip(examples[name], splits[name]["target"][:], strict=True)
        }
        if not generates and training_arguments.metric_for_best_model == "bleu":
            training_arguments.metric_for_best_model, training_arguments.greater_is_better = "loss", False
        return PreparedTask(
            model=model,
            processing_class=tokenizer,
            train_dataset=train,
            eval_dataset=evaluation,
            test_dataset=test,
            data_collator=UnwrappingCollator(DataCollatorForSeq2Seq(tokenizer, model=model)),
            metric="bleu" if generates else "loss",
            greater_is_better=generates,
            compute_metrics=TranslationMetrics(tokenizer, references) if generates else None,
            batch_size_unit=train.tokens_per_batch,
            tokens_per_epoch=train.target_tokens,
            samples_per_epoch=len(train.examples),
            facts={
                "dataset": arguments.data_dir or arguments.dataset,
                "source_lang": arguments.source_lang,
                "target_lang": arguments.target_lang,
                "vocabulary_size": len(tokenizer),
                "parameters": parameter_count(model),
                **{f"{name}_pairs": len(rows) for name, rows in examples.items()},
                **counts,
                "batches_per_epoch": len(train),
                "target_tokens_per_batch": train.tokens_per_batch,
                "padding_share": train.padding_share,
                "num_beams": arguments.num_beams,
                **({"sacrebleu_signature": bleu_signature()} if generates else {}),
            },
        )


def encode(
    splits: datasets.DatasetDict, arguments: TranslationArguments
) -> tuple[PreTrainedTokenizerBase, datasets.DatasetDict, dict[str, int]]:
    """Return tokenizer, encoded splits (`input_ids`, `attention_mask`, `labels`), and numbers of truncated texts.

    Tokenizer and splits are cached under a hash of the sentences and of the settings. Sources and training targets
    longer than `max_length` are truncated; references are not.
    """
    given = None if arguments.model is None else _load_tokenizer(arguments.model)
    backend = given.backend_tokenizer.to_str() if isinstance(given, PreTrainedTokenizerFast) else arguments.model
    key = content_fingerprint(
        splits, CACHE_VERSION, tokenizers.__version__, arguments.vocab_size, arguments.max_length, backend
    )

    def build(folder: Path) -> None:
        tokenizer, rows = given, datasets.DatasetDict()
        if tokenizer is None:
            texts = (text for column in ("source", "target") for text in splits["train"][column])
            tokenizer = train_bpe(texts, arguments.vocab_size, model_max_length=arguments.max_length)
            tokenizer.save_pretrained(folder / "tokenizer")
        for name, split in splits.items():
            limits = (arguments.max_length, arguments.max_length if name == "train" else None)
            rows[name] = datasets.Dataset.from_dict(_encode(tokenizer, split, *limits))
        rows.save_to_disk(folder / "splits")

    folder = cached_folder(arguments.cache_root / "translation", key, build)
    tokenizer = given or PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")  # nosec B615 # a local folder
    encoded = datasets.load_from_disk(str(folder / "splits"))
    counts = {f"{name}_texts_cut": sum(encoded[name]["cut"][:]) for name in encoded}
    return tokenizer, encoded.remove_columns("cut"), counts


def _encode(
    tokenizer: PreTrainedTokenizerBase, split: datasets.Dataset, longest_source: int, longest_target: int | None
) -> dict[str, list[Any]]:
    def truncated(rows: list[list[int]], limit: int | None) -> list[list[int]]:
        return [ids if limit is None or len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in rows]

    sources = tokenizer(split["source"][:], verbose=False)["input_ids"]
    targets = tokenizer(text_target=split["target"][:], verbose=False)["input_ids"]
    input_ids, labels = truncated(sources, longest_source), truncated(targets, longest_target)
    pairs = zip(zip(sources, input_ids, strict=True), zip(targets, labels, strict=True), strict=True)
    return {
        "input_ids": input_ids,
        "attention_mask": [[1] * len(ids) for ids in input_ids],
        "labels": labels,
        "cut": [sum(len(whole) > len(kept) for whole, kept in pair) for pair in pairs],
    }


def build_model(arguments: TranslationArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the model that the arguments name, or build a Marian Transformer (Vaswani et al., 2017).

    A new model has sinusoidal positions and one embedding for encoder, decoder and output. Its weights are initialized
    with a standard deviation of 0.02 at any width: on Multi30k (d_model 128, 400 steps of 960 tokens) the training loss
    reached 5.0, compared with 5.6 for `d_model ** -0.5`.

    Raises:
        FileNotFoundError: if `model` is neither a folder with a model nor found on the Hub.
        ValueError: if `model` is not a sequence-to-sequence model.
    """
    if arguments.model is not None:
        model = load_pretrained(AutoModelForSeq2SeqLM, arguments.model)
    else:
        names = "d_model encoder_layers decoder_layers dropout attention_dropout activation_dropout".split()
        shape = {name: getattr(arguments, name) for name in names}
        model = MarianMTModel(
            MarianConfig(
                vocab_size=len(tokenizer),
                **shape,
                encoder_attention_heads=arguments.attention_heads,
                decoder_attention_heads=arguments.attention_heads,
                encoder_ffn_dim=arguments.ffn_dim,
                decoder_ffn_dim=arguments.ffn_dim,
                activation_function="relu",
                scale_embedding=True,
                init_std=0.02,
                max_position_embeddings=max(LONGEST_REFERENCE, arguments.max_length),
                **{name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
                forced_eos_token_id=tokenizer.eos_token_id,
                decoder_start_token_id=tokenizer.bos_token_id,
            )
        )
    if arguments.attn_implementation is not None:
        model.set_attn_implementation(arguments.attn_implementation)
    # The loss ignores num_items_in_batch: the Trainer must divide by the number of accumulated batches.
    model.accepts_loss_kwargs = False
    model.generation_config.update(
        max_length=arguments.max_length, num_beams=arguments.num_beams, length_penalty=arguments.length_penalty
    )
    return model


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = load_pretrained(AutoTokenizer, name)
    if getattr(tokenizer, "src_lang", None) is not None:
        raise ValueError(
            f"model {name!r} needs language codes, which this task does not set; allowed: a model of one language pair."
        )
    return tokenizer
