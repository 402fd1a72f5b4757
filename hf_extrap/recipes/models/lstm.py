"""An LSTM language model as a `PreTrainedModel`, for Trainer, `generate`, Auto classes and pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, initialization
from transformers.utils import ModelOutput

from .vocabulary_head import VocabularyHead

#: (h, c), each (layers, batch, hidden): the recurrent state of an LSTM.
State = tuple[Tensor, Tensor]
#: Auto class -> class in this file.
CLASSES = {
    "AutoConfig": "ExtrapLstmConfig",
    "AutoModel": "ExtrapLstmModel",
    "AutoModelForCausalLM": "ExtrapLstmForCausalLM",
}


class ExtrapLstmConfig(PreTrainedConfig):
    """Configuration of an LSTM language model.

    Args:
        vocab_size: number of tokens.
        embedding_size: width of the embeddings; equal to `hidden_size` if they are tied to the output layer.
        hidden_size: units of each layer.
        num_hidden_layers: number of LSTM layers.
        dropout: probability of dropping an element of the embeddings, between layers, and of the output.
        initializer_range: embeddings and output weights are drawn uniformly from (-range, range).
        tie_word_embeddings: share the embeddings with the output layer (Press and Wolf 2017).
    """

    model_type = "extrap_lstm"
    keys_to_ignore_at_inference = ["cache_params", "hidden_states"]

    vocab_size: int = 33278
    embedding_size: int = 650
    hidden_size: int = 650
    num_hidden_layers: int = 3
    dropout: float | int = 0.4
    initializer_range: float = 0.1
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        for size in ("vocab_size", "embedding_size", "hidden_size", "num_hidden_layers"):
            if getattr(self, size) < 1:
                raise ValueError(f"`{size}` is {getattr(self, size)}; allowed: at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` is {self.dropout}; allowed: [0, 1).")
        if self.tie_word_embeddings and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"`embedding_size` is {self.embedding_size}; allowed: `hidden_size`, {self.hidden_size}, with tied "
                "embeddings, or `tie_word_embeddings` false."
            )
        super().__post_init__(**kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the configuration with the code of the model, for environments without this package."""
        # Of all classes: Transformers would name only the saved one, and after FSDP's renaming a wrong one.
        self.auto_map = {auto_class: f"{__name__.rpartition('.')[2]}.{name}" for auto_class, name in CLASSES.items()}
        super().save_pretrained(*args, **kwargs)


@dataclass
class ExtrapLstmOutput(ModelOutput):
    """Output of `ExtrapLstmModel`, the hidden states and the state, and of `ExtrapLstmForCausalLM`, all others.

    Attributes:
        loss: mean cross entropy in nats over the targets (with labels).
        logits: (batch, length, vocab_size) (without labels).
        token_losses: (batch, length - 1) fp32, detached; 0 where the label is -100 (with labels).
        last_hidden_state: (batch, length, hidden_size), after dropout.
        cache_params: state after the last token read.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    token_losses: Tensor | None = None
    last_hidden_state: Tensor | None = None
    cache_params: State | None = None


class ExtrapLstmPreTrainedModel(PreTrainedModel):
    """Initialization, and the attributes of a recurrent model."""

    config_class = ExtrapLstmConfig
    base_model_prefix = "model"
    _input_embed_layer = "embeddings"
    _is_stateful = True
    _no_split_modules = ["ExtrapLstmModel"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        bound = self.config.initializer_range
        if isinstance(module, nn.Embedding | nn.Linear):
            initialization.uniform_(module.weight, -bound, bound)
            if isinstance(module, nn.Linear) and module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.LSTM):
            for parameter in module.parameters():
                initialization.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)


class ExtrapLstmModel(ExtrapLstmPreTrainedModel):
    """Embeddings and stacked LSTM, batch first."""

    def __init__(self, config: ExtrapLstmConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.dropout = nn.Dropout(config.dropout)
        layers, dropout = config.num_hidden_layers, config.dropout if config.num_hidden_layers > 1 else 0.0
        self.lstm = nn.LSTM(config.embedding_size, config.hidden_size, layers, batch_first=True, dropout=dropout)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache_params: State | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ExtrapLstmOutput | tuple[Tensor, ...]:
        """Read tokens, starting from a state.

        Args:
            input_ids: (batch, length) int64; or `inputs_embeds`, (batch, length, embedding_size).
            attention_mask: (batch, length or more), of which the last `length` columns are used; 0 for padding, which
                leaves the state unchanged.
            cache_params: initial state; default: zeros.
            use_cache: False omits the state. `config.use_cache`, which the Trainer disables, is ignored.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("`input_ids` and `inputs_embeds` are both given or both None; allowed: exactly one.")
        embedded = self.dropout(self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds)
        if attention_mask is not None:
            attention_mask = attention_mask[:, -embedded.shape[1] :].bool()
        if attention_mask is None or bool(attention_mask.all()):
            output, state = self.lstm(embedded, cache_params)
        else:
            output, state = self._read_masked(embedded, attention_mask, cache_params)
        if use_cache is False:
            state = None
        result = ExtrapLstmOutput(last_hidden_state=self.dropout(output), cache_params=state)
        return result.to_tuple() if return_dict is False else result

    def _read_masked(self, embedded: Tensor, mask: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Read token by token; padding leaves the state of its row unchanged."""
        if state is None:
            shape = (self.config.num_hidden_layers, embedded.shape[0], self.config.hidden_size)
            state = (embedded.new_zeros(shape), embedded.new_zeros(shape))
        outputs = []
        for step in range(embedded.shape[1]):
            output, new = self.lstm(embedded[:, step : step + 1], state)
            keep = mask[:, step].view(1, -1, 1)
            state = (torch.where(keep, new[0], state[0]), torch.where(keep, new[1], state[1]))
            outputs.append(output)
        return torch.cat(outputs, dim=1), state


class ExtrapLstmForCausalLM(ExtrapLstmPreTrainedModel, GenerationMixin):
    """LSTM language model.

    Labels are shifted inside the model, as in every causal model of Transformers. With labels the last input token is
    only a target: the returned state is that before it. So chunks of a text that overlap by one token, each with
    `labels = input_ids`, count every target once and pass on the right state.
    """

    # The loss ignores num_items_in_batch: the Trainer must divide by the number of accumulated batches.
    accepts_loss_kwargs = False
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: ExtrapLstmConfig) -> None:
        super().__init__(config)
        self.model = ExtrapLstmModel(config)
        self.lm_head = VocabularyHead(config.hidden_size, config.vocab_size)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache_params: State | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> ExtrapLstmOutput | tuple[Any, ...]:
        """Compute logits, or the loss of the labels.

        Args:
            input_ids, attention_mask, cache_params, inputs_embeds: see `ExtrapLstmModel.forward`.
            labels: (batch, length) int64, position i is predicted from the tokens before it; -100 and the first
                position are ignored.
            logits_to_keep: number of last positions to compute logits of; 0 for all.

        Raises:
            ValueError: if labels differ in shape from the input, or have fewer than two positions.
        """
        if labels is not None:
            tokens = inputs_embeds if input_ids is None else input_ids
            shape = labels.shape if tokens is None else tokens.shape[:2]
            if labels.shape != shape or shape[1] < 2:
                raise ValueError(
                    f"labels have shape {tuple(labels.shape)} and the input {tuple(shape)}; allowed: equal shapes with "
                    "at least two positions."
                )
            input_ids = None if input_ids is None else input_ids[:, :-1]
            inputs_embeds = None if inputs_embeds is None else inputs_embeds[:, :-1]
            attention_mask = None if attention_mask is None else attention_mask[:, :-1]
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        read = self.model(**given, cache_params=cache_params, use_cache=use_cache)
        loss = logits = token_losses = None
        if labels is None:
            logits = self.lm_head(read.last_hidden_state[:, -logits_to_keep:])
        else:
            loss, token_losses = self.lm_head(read.last_hidden_state, labels[:, 1:])
        result = ExtrapLstmOutput(loss, logits, token_losses, cache_params=read.cache_params)
        return result.to_tuple() if return_dict is False else result

    def _reorder_cache(self, cache_params: State, beam_idx: Tensor) -> State:
        h, c = (part.index_select(1, beam_idx.to(part.device)) for part in cache_params)
        return h, c


# A saved configuration, and so a saved model, carries this file and those that it imports from this folder.
ExtrapLstmConfig.register_for_auto_class()
