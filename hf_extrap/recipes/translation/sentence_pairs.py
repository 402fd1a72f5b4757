"""Sentence pairs of any corpus as the columns `source` and `target`."""

from __future__ import annotations

import datasets

from hf_extrap.recipes.data import DataArguments, load_splits


def sentence_pairs(arguments: DataArguments, source_lang: str, target_lang: str) -> datasets.DatasetDict:
    """Load the splits with the columns `source` and `target`.

    Rows of the data are `{"translation": {"en": …, "de": …}}`, or have one column per language, as in
    `bentrevett/multi30k`. Whitespace around a sentence is removed.

    Raises:
        FileNotFoundError: if the folder, a file or the dataset is missing.
        ValueError: if a split is empty, cannot be read or lacks a language, or a sentence is not text.
    """
    languages = (source_lang, target_lang)

    def builtin() -> datasets.DatasetDict:
        from hf_extrap.recipes.translation.builtin import builtin_pairs  # the only user of Babel

        return builtin_pairs(*languages)

    splits = load_splits(arguments, columns=(), builtin=builtin)
    for name, split in splits.items():
        nested = "translation" in split.column_names
        first = split[0]["translation"] if nested else None
        available = sorted(first) if isinstance(first, dict) else split.column_names
        # A whole column is much faster to read than its rows.
        rows = split["translation"][:] if nested else []
        columns: dict[str, list[str]] = {}
        for column, language in zip(("source", "target"), languages, strict=True):
            if language not in available:
                raise ValueError(f"split {name!r} has no sentences in {language!r}: it has {', '.join(available)}.")
            texts = [row[language] for row in rows] if nested else split[language][:]
            for number, text in enumerate(texts):
                if not isinstance(text, str):
                    raise ValueError(f"row {number} of split {name!r} has no text in {language!r}: {text!r:.80}.")
            columns[column] = [text.strip() for text in texts]
        splits[name] = type(split).from_dict(columns)
    return splits
