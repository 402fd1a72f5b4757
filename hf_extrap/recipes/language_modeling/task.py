"""Language modeling: text, the LSTM of this package or any causal model of Transformers, and perplexity."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from hf_extrap.recipes.data import DataArguments, check_texts, load_pretrained, load_splits
from hf_extrap.recipes.language_modeling.streams import StreamDataset, collate
from hf_extrap.recipes.language_modeling.text import builtin_text, token_streams
from hf_extrap.recipes.models.vocabulary_head import IGNORED, VocabularyHead
from hf_extrap.recipes.task import PreparedTask, check_fields, parameter_count
from hf_extrap.training.arguments import described

LSTM = "extrap_lstm"


@dataclass
class LanguageModelingArguments(DataArguments):
    """Fields of the task `language_modeling`; new models but the LSTM take `config_overrides`."""

    seq_len: int = described(30, "Targets of a chunk: length of backpropagation through time.")
    vocab_size: int | None = described(
        None, "Limit of the word-level vocabulary; default: all words of the three splits."
    )
    model_type: str = described(LSTM, "Architecture of a new model: any causal model.")
    config_overrides: str | None = described(None, "Configuration of a new model, such as 'n_embd=128,n_layer=2'.")
    from_scratch: bool = described(False, "Use the configuration of `model`, not its weights.")
    embedding_size: int | None = described(None, "LSTM: default is `hidden_size`.")
    hidden_size: int = described(650, "LSTM: units of a layer.")
    num_hidden_layers: int = described(3, "LSTM: layers.")
    dropout: float = described(0.4, "LSTM: dropout of the embeddings, between layers, and of the output.")
    tie_word_embeddings: bool = described(True, "LSTM: share embeddings and output weights.")
    unigram_bias: bool = described(False, "LSTM: initialize the output bias with the words' log frequencies in train.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, seq_len=(self.seq_len >= 1, "at least 1"))
        if self.model is None and self.from_scratch:
            raise ValueError("`from_scratch` is true and `model` is null; allowed: true only with a `model`.")
        if self.unigram_bias and (self.model is not None or self.model_type != LSTM):
            raise ValueError("`unigram_bias` is true; allowed: only for a new LSTM.")


class LanguageModelingTask:
    """Next-token prediction on contiguous streams of text."""

    name: ClassVar[str] = "language_modeling"
    arguments_class: ClassVar[type] = LanguageModelingArguments
    seq2seq: ClassVar[bool] = False

    def training_defaults(self) -> dict[str, Any]:
        """Return defaults for recurrent models; others need `carry_state: false`, `train_sampling_strategy: random`."""
        return {
            "train_sampling_strategy": "sequential",
            "carry_state": True,
            "remove_unused_columns": False,
            "per_device_train_batch_size": 64,
            "per_device_eval_batch_size": 64,
        }

    def prepare(self, arguments: LanguageModelingArguments, training_arguments: TrainingArguments) -> PreparedTask:
        """Load and tokenize the text (main process first), and build the model, streams and metric."""
        config, tokenizer = _load_config(arguments.model) if arguments.model is not None else (None, None)
        with training_arguments.main_process_first(desc="text data"):
            splits = load_splits(arguments, columns=("text",), builtin=builtin_text)
            check_texts(splits, "text")
            tokenizer, ids = token_streams(splits, arguments.cache_root, tokenizer, arguments.vocab_size)
        model = _build_model(arguments, config, tokenizer)
        if arguments.unigram_bias:
            set_unigram_bias(model.lm_head, ids["train"])
        _check_order(model, arguments, training_arguments)

        def streams(name: str, count: int, complete: bool) -> StreamDataset:
            return StreamDataset(ids[name], streams=count, seq_len=arguments.seq_len, complete=complete, name=name)

        world_size = training_arguments.world_size
        workers = world_size * training_arguments.gradient_accumulation_steps
        train = streams("train", training_arguments.train_batch_size * workers, False)
        evaluated = {name: streams(name, training_arguments.eval_batch_size * world_size, True) for name in ids}
        return PreparedTask(
            model=model,
            processing_class=tokenizer,
            train_dataset=train,
            eval_dataset=evaluated["validation"],
            test_dataset=evaluated["test"],
            data_collator=collate,
            metric="perplexity",
            greater_is_better=False,
            compute_metrics=compute_perplexity,
            preprocess_logits_for_metrics=sum_token_losses,
            tokens_per_epoch=train.targets,
            samples_per_epoch=len(train),
            facts={
                "dataset": Path(arguments.data_dir).name if arguments.data_dir else arguments.dataset,
                "language": "en" if arguments.data_dir is None and arguments.dataset == "builtin" else None,
                "vocabulary_size": len(tokenizer),
                "parameters": parameter_count(model),
                "streams": train.streams,
                "seq_len": arguments.seq_len,
                **{f"{name}_tokens": len(stream) - 1 for name, stream in ids.items()},
            },
        )


def _load_config(name: str) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase | None]:
    """Configuration and, if it has one, tokenizer of a model."""
    config = load_pretrained(AutoConfig, name)
    if config.is_encoder_decoder:
        raise ValueError(f"model {name!r} is an encoder-decoder ({config.model_type}); allowed: causal models.")
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        return config, None
    return config, load_pretrained(AutoTokenizer, name)


def _build_model(
    arguments: LanguageModelingArguments, config: PreTrainedConfig | None, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The pretrained model of `arguments.model`, or a new one of its configuration or of `arguments.model_type`."""
    name, folder = str(arguments.model), Path(str(arguments.model))
    kinds = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
    has_weights = not folder.is_dir() or any(any(folder.glob(kind)) for kind in kinds)
    if config is not None and not arguments.from_scratch and has_weights:
        if arguments.config_overrides:
            raise ValueError(
                "`config_overrides` is given with a pretrained `model`; allowed: with `from_scratch` true."
            )
        model = load_pretrained(AutoModelForCausalLM, name)
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"model {name!r} has {model.config.vocab_size} tokens and the text {len(tokenizer)}; save "
                "the tokenizer with the model, or set `from_scratch` to true."
            )
        return model
    if config is None and arguments.model_type == LSTM:
        fields = ("hidden_size", "num_hidden_layers", "dropout", "tie_word_embeddings")
        shape = {field: getattr(arguments, field) for field in fields}
        config = AutoConfig.for_model(LSTM, embedding_size=arguments.embedding_size or arguments.hidden_size, **shape)
    elif config is None:
        known = arguments.model_type in CONFIG_MAPPING
        check_fields(arguments, model_type=(known, f"{LSTM!r}, or a type of AutoConfig, such as 'gpt2'"))
        config = AutoConfig.for_model(arguments.model_type)
    if arguments.config_overrides:
        try:
            config.update_from_string(arguments.config_overrides)
        except ValueError as error:
            reason = str(error).removesuffix(".")
            raise ValueError(f"`config_overrides` is {arguments.config_overrides!r}: {reason}.") from error
    config.vocab_size = len(tokenizer)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, token, getattr(tokenizer, token))
    return AutoModelForCausalLM.from_config(config)


def _check_order(
    model: PreTrainedModel, arguments: LanguageModelingArguments, training_arguments: TrainingArguments
) -> None:
    """Refuse chunks that the model cannot read, and a recurrent state that is carried to the wrong chunk."""
    limit = getattr(model.config, "max_position_embeddings", None)
    fits = limit is None or arguments.seq_len + 1 <= limit
    check_fields(arguments, seq_len=(fits, f"at most {(limit or 0) - 1}, by the positions of the model"))
    if not getattr(training_arguments, "carry_state", False):
        return
    if model.config.model_type != LSTM:
        raise ValueError(
            f"`carry_state` is true and {model.config.model_type!r} is not recurrent: set `carry_state` to false (and "
            "`train_sampling_strategy` to 'random')."
        )
    if training_arguments.train_sampling_strategy != "sequential":
        raise ValueError(
            "`carry_state` needs a stream's chunks in order: set `train_sampling_strategy` to 'sequential'."
        )


@torch.no_grad()
def set_unigram_bias(head: VocabularyHead, ids: np.ndarray) -> None:
    """Set the output bias to log((count + 1/2) / total), so that training starts from the unigram model."""
    counts = torch.bincount(torch.from_numpy(ids[1:].astype(np.int64)), minlength=head.out_features).float() + 0.5
    gathered: AbstractContextManager[Any] = nullcontext()
    if hasattr(head.bias, "ds_id"):  # ZeRO-3 has partitioned it
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters([head.bias], modifier_rank=0)
    with gathered:
        head.bias.copy_((counts / counts.sum()).log())


def sum_token_losses(outputs: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Reduce a batch's outputs to sums, so that no logits are gathered.

    Args:
        outputs: losses of the targets (batch, length - 1), from `ExtrapLstmForCausalLM`, or logits
            (batch, length, vocabulary); the first element of a tuple.
        labels: (batch, length), -100 where ignored.

    Returns:
        (batch, 2) fp32: sum of the negative log-likelihoods in nats, and number of targets.
    """
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    targets = labels[:, 1:]
    if first.dim() == 3:
        losses = F.cross_entropy(first[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    else:
        losses = first
    return torch.stack([losses.float().sum(1), (targets != IGNORED).sum(1).float()], dim=1)


def compute_perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """Perplexity exp(sum of losses / number of targets) from the sums of `sum_token_losses`; inf on overflow."""
    total, count = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    mean = total / count
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf}
