"""hf-extrap compare: train presets on the same data order."""

from __future__ import annotations

import argparse

from .imports import hide_loading_bars, importing

PARSER = {
    "help": "train presets against each other on the same data order",
    "usage": "hf-extrap compare [CONFIG.yaml] [options] [--field value ...]",
    "description": "CONFIG.yaml and the other options, --field value, apply to every run.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--presets", default="none,extrap,extrap-past", help="presets, separated by commas")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument("--learning_rates", help="separated by commas; default: the configuration's")
    parser.add_argument("--target", type=float, help="value of the metric to count the steps to")
    parser.add_argument("--output_dir", help="folder for all runs; default: runs/compare-<config>")


def run(known: argparse.Namespace, rest: list[str], command: str) -> int:
    """Run what is left of the comparison, and print its tables."""
    with importing():
        from hf_extrap.lab.compare import compare, comparison, parse_list

    hide_loading_bars()
    study = comparison(
        known.path,
        rest,
        presets=parse_list("presets", known.presets, str),
        seeds=parse_list("seeds", known.seeds, int),
        learning_rates=parse_list("learning_rates", known.learning_rates, float) if known.learning_rates else None,
        target=known.target,
    )
    return compare(study, known.output_dir, command)
