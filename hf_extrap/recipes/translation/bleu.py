"""BLEU and chrF of a translation model, computed by sacreBLEU without network access."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_extrap.training.extras import extra

with extra("recipes"):
    import datasets
    import evaluate
    from sacrebleu.metrics import BLEU, CHRF


class Bleu(evaluate.Metric):
    """sacreBLEU as an `evaluate` metric; `evaluate.load("sacrebleu")` would download a script.

    Corpus BLEU (Papineni et al., 2002) and chrF (Popović, 2015) of detokenized, cased text, with sacreBLEU's defaults
    (Post, 2018). `compute(predictions=[...], references=[...])` takes one reference per prediction and returns `score`
    (0 to 100), `counts` and `totals` (matching and all n-grams for n = 1 to 4), `precisions`, `brevity_penalty`,
    `system_length`, `reference_length`, `signature`, `chrf` (0 to 100) and `chrf_signature`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="Matt Post. A Call for Clarity in Reporting BLEU Scores. WMT 2018, https://aclanthology.org/W18-6319.",
            inputs_description="predictions: list of str; references: list of str, one per prediction.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        bleu, chrf = BLEU(), CHRF()
        score = bleu.corpus_score(list(predictions), [list(references)])
        chrf_score = chrf.corpus_score(list(predictions), [list(references)])
        return {
            "score": score.score,
            "counts": list(score.counts),
            "totals": list(score.totals),
            "precisions": list(score.precisions),
            "brevity_penalty": score.bp,
            "system_length": score.sys_len,
            "reference_length": score.ref_len,
            "signature": str(bleu.get_signature()),
            "chrf": chrf_score.score,
            "chrf_signature": str(chrf.get_signature()),
        }


def bleu_signature() -> str:
    """Return sacreBLEU's signature of the scores of `Bleu`."""
    return Bleu().compute(predictions=["a"], references=["a"])["signature"]


class TranslationMetrics:
    """`compute_metrics` of a `Seq2SeqTrainer` with `predict_with_generate`: BLEU and chrF of the decoded text.

    Rows without labels are fillers (see `FullBatches`) and are left out.

    Args:
        tokenizer: decodes predictions and labels.
        references: reference texts by their label ids; other labels are decoded.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, references: Mapping[tuple[int, ...], str] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.references = dict(references or {})
        self.bleu = Bleu()

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return `bleu`, `chrf` (0 to 100) and `length_ratio` (words of the system over words of the references).

        Args:
            prediction: `predictions` and `label_ids` of shapes (rows, tokens), padded with -100 or the pad token.
        """
        predictions, references = self.texts(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))
        result = self.bleu.compute(predictions=predictions, references=references)
        return {
            "bleu": result["score"],
            "chrf": result["chrf"],
            "length_ratio": result["system_length"] / max(result["reference_length"], 1),
        }

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
