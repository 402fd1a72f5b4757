"""Sentence pairs of any corpus, and built-in English-German ones from Babel's locale data (CLDR)."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import islice
from typing import Literal

from hf_extrap.recipes.data import DataArguments, load_splits
from hf_extrap.training.extras import extra

with extra("recipes"):
    import datasets
    from babel import Locale
    from babel.dates import format_date, format_datetime, format_time, format_timedelta
    from babel.lists import format_list
    from babel.numbers import format_compact_decimal, format_currency, format_decimal, format_percent
    from babel.units import format_unit

LOCALES = {"en": Locale("en", "US"), "de": Locale("de", "DE")}
UNITS = (
    "length-meter length-kilometer length-centimeter length-mile mass-kilogram mass-gram mass-tonne "
    "volume-liter duration-second duration-minute duration-hour duration-day duration-week duration-month "
    "duration-year temperature-celsius speed-kilometer-per-hour area-square-meter energy-kilowatt-hour power-watt"
).split()
CURRENCIES = "EUR USD GBP CHF JPY SEK NOK DKK PLN CZK CAD AUD INR CNY BRL MXN ZAR TRY".split()
#: Unit of a time span and its length in seconds; months and years have their mean length.
SPANS: dict[Literal["minute", "hour", "day", "week", "month", "year"], int]
SPANS = {"minute": 60, "hour": 3600, "day": 86400, "week": 604800, "month": 2629800, "year": 31557600}
#: Writes one content in the language of a locale.
Writer = Callable[[Locale], str]


def sentence_pairs(arguments: DataArguments, source_lang: str, target_lang: str) -> datasets.DatasetDict:
    """Load the splits with the columns `source` and `target`.

    Rows of the data are `{"translation": {"en": …, "de": …}}`, or have one column per language, as in
    `bentrevett/multi30k`. Whitespace around a sentence is removed.

    Raises:
        FileNotFoundError: if the folder, a file or the dataset is missing.
        ValueError: if a split is empty, cannot be read or lacks a language, or a sentence is not text.
    """
    languages = (source_lang, target_lang)
    splits = load_splits(arguments, columns=(), builtin=lambda: builtin_pairs(*languages))
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


def builtin_pairs(
    source_lang: str = "en",
    target_lang: str = "de",
    *,
    seed: int = 0,
    train: int = 4000,
    validation: int = 200,
    test: int = 200,
) -> datasets.DatasetDict:
    """Generate the splits train, validation and test, with rows `{"translation": {"en": …, "de": …}}`.

    The sentences are dates, times, numbers, measures, amounts of money, time spans, and lists of territories and of
    languages, in the form of each language. No English and no German sentence is in two rows.

    Raises:
        ValueError: if the languages are not English (`en`) and German (`de`), in either order.
    """
    if {source_lang, target_lang} != set(LOCALES):
        raise ValueError(
            f"the built-in pairs are English (en) and German (de), not {source_lang!r} and {target_lang!r}: "
            "give `data_dir` or `dataset`."
        )
    generator = random.Random(seed)
    sizes = {"train": train, "validation": validation, "test": test}
    rows: list[dict[str, str]] = []
    seen: set[tuple[str, str]] = set()
    while len(rows) < sum(sizes.values()):
        write = generator.choice(KINDS)(generator)
        # Whitespace of CLDR, such as no-break spaces, becomes a space.
        pair = {language: " ".join(write(locale).split()) for language, locale in LOCALES.items()}
        if seen.isdisjoint(pair.items()):
            seen.update(pair.items())
            rows.append(pair)
    row = iter(rows)
    splits = {name: {"translation": list(islice(row, size))} for name, size in sizes.items()}
    return datasets.DatasetDict({name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()})


def _moment(generator: random.Random) -> datetime:
    return datetime(1900, 1, 1) + timedelta(minutes=generator.randrange(200 * 365 * 24 * 60))


def _date(generator: random.Random) -> Writer:
    moment, form = _moment(generator), generator.choice(("full", "full", "long", "medium"))
    return lambda locale: format_date(moment, form, locale=locale)


def _date_and_time(generator: random.Random) -> Writer:
    moment, form = _moment(generator), generator.choice(("medium", "short"))
    return lambda locale: format_datetime(moment, form, locale=locale)


def _weekday_and_time(generator: random.Random) -> Writer:
    moment = _moment(generator)
    return lambda locale: f"{format_date(moment, 'EEEE', locale=locale)}, {format_time(moment, 'short', locale=locale)}"


def _number(generator: random.Random) -> Writer:
    value = round(generator.uniform(0, 10 ** generator.randint(1, 8)), generator.randint(0, 3))
    if generator.random() < 0.3:
        return lambda locale: format_compact_decimal(value, format_type="long", locale=locale, fraction_digits=1)
    if generator.random() < 0.3:
        return lambda locale: format_percent(value % 100 / 100, "#,##0.0 %", locale=locale)
    return lambda locale: format_decimal(value, locale=locale)


def _measure(generator: random.Random) -> Writer:
    value, unit = round(generator.uniform(1, 2000), generator.randint(0, 1)), generator.choice(UNITS)
    return lambda locale: format_unit(value, unit, length="long", locale=locale)


def _money(generator: random.Random) -> Writer:
    value, currency = round(generator.uniform(0, 10 ** generator.randint(1, 6)), 2), generator.choice(CURRENCIES)
    return lambda locale: format_currency(value, currency, locale=locale, format_type="name")


def _span(generator: random.Random) -> Writer:
    unit, seconds = generator.choice(list(SPANS.items()))
    span = timedelta(seconds=seconds * generator.randint(1, 400) * generator.choice((-1, 1)))
    return lambda locale: format_timedelta(span, granularity=unit, threshold=1e9, add_direction=True, locale=locale)


def _territories(generator: random.Random) -> Writer:
    codes = sorted(code for code in _common("territories") if len(code) == 2)
    chosen = generator.sample(codes, generator.randint(1, 4))
    return lambda locale: format_list([locale.territories[code] for code in chosen], locale=locale)


def _languages(generator: random.Random) -> Writer:
    chosen = generator.sample(sorted(_common("languages")), generator.randint(1, 4))
    return lambda locale: format_list([locale.languages[code] for code in chosen], locale=locale)


def _common(names: str) -> set[str]:
    """Codes that have a name in every locale."""
    return set.intersection(*({*getattr(locale, names)} for locale in LOCALES.values()))


KINDS = (_date, _date_and_time, _weekday_and_time, _number, _measure, _money, _span, _territories, _languages)
