"""A joint byte-pair encoding of source and target language."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS, UNK = "<pad>", "</s>", "<s>", "<unk>"
#: Bytes and special tokens: the vocabulary before the first merge.
SMALLEST = 256 + 4


def train_bpe(texts: Iterable[str], vocab_size: int, *, model_max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) on the texts of both languages.

    Decoding restores every text exactly, including unseen characters. Encoding appends `</s>`; `<s>` only starts the
    decoder. A word has the same ids at the start of a sentence and within it. A small corpus may give fewer tokens than
    `vocab_size`; `model_max_length`, in tokens, is the limit of `truncation=True`.

    Raises:
        ValueError: if `vocab_size` is too small for the bytes and the special tokens.
    """
    if vocab_size < SMALLEST:
        raise ValueError(f"`vocab_size` is {vocab_size}; allowed: at least {SMALLEST} (bytes, special tokens).")
    tokenizer = Tokenizer(models.BPE())
    # A space before the first word gives it the same token as elsewhere; the decoder removes exactly one space.
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, BOS, UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNK,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
