"""BLEU and chrF of a translation model, computed by sacreBLEU without network access."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_extrap.training.extras import extra

with extra("recipes"):
    from sacrebleu.metrics import BLEU, CHRF


def bleu_signature() -> str:
    """Return sacreBLEU's signature of the scores of `TranslationMetrics`."""
    metric = BLEU()
    metric.corpus_score(["a"], [["a"]])
    return str(metric.get_signature())


class TranslationMetrics:
    """`compute_metrics` of a `Seq2SeqTrainer` with `predict_with_generate`: BLEU and chrF of the decoded text.

    Corpus BLEU (Papineni et al., 2002) and chrF (Popović, 2015) of detokenized, cased text, with sacreBLEU's defaults
    (Post, 2018). Rows without labels are fillers (see `FullBatches`) and are left out. `references` has reference texts
    by their label ids; other labels are decoded.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, references: Mapping[tuple[int, ...], str] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.references = dict(references or {})

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return `bleu`, `chrf` (0 to 100) and `length_ratio` (words of the system over words of the references).

        Args:
            prediction: `predictions` and `label_ids` of shapes (rows, tokens), padded with -100 or the pad token.
        """
        predictions, references = self.texts(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))
        bleu = BLEU().corpus_score(predictions, [references])
        chrf = CHRF().corpus_score(predictions, [references])
        return {"bleu": bleu.score, "chrf": chrf.score, "length_ratio": bleu.sys_len / max(bleu.ref_len, 1)}

    def texts(self, predictions: np.ndarray, label_ids: np.ndarray) -> tuple[list[str], list[str]]:
        """Decode predictions and references, two aligned lists without fillers."""
        pad = self.tokenizer.pad_token_id
        rows = np.where(predictions < 0, pad, predictions)
        labels = [tuple(int(token) for token in row if token not in (-100, pad)) for row in label_ids]
        kept = [index for index, tokens in enumerate(labels) if tokens]
        labels = [labels[index] for index in kept]
        decoded = self.tokenizer.batch_decode(rows[kept], skip_special_tokens=True)
        references = self.tokenizer.batch_decode([list(tokens) for tokens in labels], skip_special_tokens=True)
        references = [self.references.get(*pair) for pair in zip(labels, references, strict=True)]
        return [text.strip() for text in decoded], [text.strip() for text in references]
