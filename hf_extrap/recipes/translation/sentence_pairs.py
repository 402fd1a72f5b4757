"""Sentence pairs: those of a corpus in one form, and English-German ones made from Babel's locale data (CLDR)."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Literal

import datasets
from babel import Locale
from babel.dates import format_date, format_datetime, format_time, format_timedelta
from babel.lists import format_list
from babel.numbers import format_compact_decimal, format_currency, format_decimal, format_percent
from babel.units import format_unit

from hf_extrap.recipes.task import DataArguments, load_splits

LOCALES = {"en": Locale("en", "US"), "de": Locale("de", "DE")}
_UNITS = (
    "length-meter length-kilometer length-centimeter length-mile mass-kilogram mass-gram mass-tonne "
    "volume-liter duration-second duration-minute duration-hour duration-day duration-week duration-month "
    "duration-year temperature-celsius speed-kilometer-per-hour area-square-meter energy-kilowatt-hour power-watt"
).split()
_CURRENCIES = "EUR USD GBP CHF JPY SEK NOK DKK PLN CZK CAD AUD INR CNY BRL MXN ZAR TRY".split()
#: Unit of a span of time and its length in seconds; months and years are mean ones.
_SPANS: tuple[tuple[Literal["minute", "hour", "day", "week", "month", "year"], int], ...] = (
    ("minute", 60),
    ("hour", 3600),
    ("day", 86400),
    ("week", 604800),
    ("month", 2629800),
    ("year", 31557600),
)
#: Writes one content in a locale.
_Writer = Callable[[Locale], str]


def sentence_pairs(arguments: DataArguments, source_lang: str, target_lang: str) -> datasets.DatasetDict:
    """Load the splits with the columns `source` and `target`, whatever form the data has.

    Rows are `{"translation": {"en": …, "de": …}}`, or have one column a language, as in `bentrevett/multi30k`. Space
    around a sentence is removed.

    Raises:
        FileNotFoundError: If the folder, a file or the dataset is missing.
        ValueError: If a split is empty, corrupt or lacks a language, or a sentence is not text.
    """
    languages = (source_lang, target_lang)
    splits = load_splits(arguments, columns=(), builtin=lambda: builtin_pairs(*languages))
    return datasets.DatasetDict({name: _normalised(split, name, languages) for name, split in splits.items()})


def _normalised(split: datasets.Dataset, name: str, languages: tuple[str, str]) -> datasets.Dataset:
    nested = "translation" in split.column_names
    first = split[0]["translation"] if nested else None
    available = sorted(first) if isinstance(first, dict) else split.column_names
    missing = [language for language in languages if language not in available]
    if missing:
        raise ValueError(f"split {name!r} has no sentences in {missing[0]!r}: it has {', '.join(available)}.")
    # By whole columns, which a dataset gives far faster than its rows one by one.
    rows = split["translation"][:] if nested else []
    columns: dict[str, list[str]] = {}
    for column, language in zip(("source", "target"), languages, strict=True):
        texts = [row[language] for row in rows] if nested else split[language][:]
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"row {number} of split {name!r} has no text in {language!r}: {text!r:.80}.")
        columns[column] = [text.strip() for text in texts]
    return datasets.Dataset.from_dict(columns)


def builtin_pairs(
    source_lang: str = "en",
    target_lang: str = "de",
    *,
    seed: int = 0,
    train: int = 4000,
    validation: int = 200,
    test: int = 200,
) -> datasets.DatasetDict:
    """Make the splits train, validation and test, with rows `{"translation": {"en": …, "de": …}}`.

    The sentences are dates, times, numbers, measures, amounts of money, spans of time, and lists of territories and
    of languages, as each language writes them. No English and no German sentence is in two rows.

    Args:
        source_lang: `en` or `de`.
        target_lang: The other one.
        seed: Equal seeds give equal pairs.
        train: Rows of the split train.
        validation: Rows of the split validation.
        test: Rows of the split test.

    Raises:
        ValueError: If the languages are not English and German.
    """
    if {source_lang, target_lang} != set(LOCALES):
        raise ValueError(
            f"the built-in pairs are English (en) and German (de), not {source_lang!r} and {target_lang!r}: "
            "give `data_dir` or `dataset`."
        )
    sizes = {"train": train, "validation": validation, "test": test}
    generator = random.Random(seed)
    seen: dict[str, set[str]] = {language: set() for language in LOCALES}
    rows: list[dict[str, str]] = []
    while len(rows) < sum(sizes.values()):
        write = generator.choice(_KINDS)(generator)
        pair = {language: _plain_spaces(write(locale)) for language, locale in LOCALES.items()}
        if any(pair[language] in seen[language] for language in LOCALES):
            continue
        for language in LOCALES:
            seen[language].add(pair[language])
        rows.append(pair)
    splits, start = {}, 0
    for name, size in sizes.items():
        splits[name] = datasets.Dataset.from_dict({"translation": rows[start : start + size]})
        start += size
    return datasets.DatasetDict(splits)


def _plain_spaces(text: str) -> str:
    return " ".join(text.split())


def _moment(generator: random.Random) -> datetime:
    return datetime(1900, 1, 1) + timedelta(minutes=generator.randrange(200 * 365 * 24 * 60))


def _date(generator: random.Random) -> _Writer:
    moment, form = _moment(generator), generator.choice(("full", "full", "long", "medium"))
    return lambda locale: format_date(moment, form, locale=locale)


def _date_and_time(generator: random.Random) -> _Writer:
    moment, form = _moment(generator), generator.choice(("medium", "short"))
    return lambda locale: format_datetime(moment, form, locale=locale)


def _weekday_and_time(generator: random.Random) -> _Writer:
    moment = _moment(generator)
    return lambda locale: f"{format_date(moment, 'EEEE', locale=locale)}, {format_time(moment, 'short', locale=locale)}"


def _number(generator: random.Random) -> _Writer:
    value = round(generator.uniform(0, 10 ** generator.randint(1, 8)), generator.randint(0, 3))
    if generator.random() < 0.3:
        return lambda locale: format_compact_decimal(value, format_type="long", locale=locale, fraction_digits=1)
    if generator.random() < 0.3:
        return lambda locale: format_percent(value % 100 / 100, "#,##0.0 %", locale=locale)
    return lambda locale: format_decimal(value, locale=locale)


def _measure(generator: random.Random) -> _Writer:
    value, unit = round(generator.uniform(1, 2000), generator.randint(0, 1)), generator.choice(_UNITS)
    return lambda locale: format_unit(value, unit, length="long", locale=locale)


def _money(generator: random.Random) -> _Writer:
    value, currency = round(generator.uniform(0, 10 ** generator.randint(1, 6)), 2), generator.choice(_CURRENCIES)
    return lambda locale: format_currency(value, currency, locale=locale, format_type="name")


def _span(generator: random.Random) -> _Writer:
    unit, seconds = generator.choice(_SPANS)
    span = timedelta(seconds=seconds * generator.randint(1, 400) * generator.choice((-1, 1)))
    return lambda locale: format_timedelta(span, granularity=unit, threshold=1e9, add_direction=True, locale=locale)


def _territories(generator: random.Random) -> _Writer:
    codes = sorted(code for code in _common("territories") if len(code) == 2)
    chosen = generator.sample(codes, generator.randint(1, 4))
    return lambda locale: format_list([locale.territories[code] for code in chosen], locale=locale)


def _languages(generator: random.Random) -> _Writer:
    chosen = generator.sample(sorted(_common("languages")), generator.randint(1, 4))
    return lambda locale: format_list([locale.languages[code] for code in chosen], locale=locale)


def _common(names: str) -> set[str]:
    """Return the codes that have a name in every locale."""
    return set.intersection(*({*getattr(locale, names)} for locale in LOCALES.values()))


_KINDS = (_date, _date_and_time, _weekday_and_time, _number, _measure, _money, _span, _territories, _languages)
