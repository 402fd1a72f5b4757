"""What is installed, which devices are here, and which launch configurations this machine can run."""

from __future__ import annotations

from .configurations import judge, judge_all, shipped
from .machine import LAUNCH_VARIABLES, TESTED, Machine, this_machine, untested_versions
from .report import devices, engines, print_json, print_report
from .verdict import Verdict

__all__ = [
    "LAUNCH_VARIABLES",
    "TESTED",
    "Machine",
    "Verdict",
    "devices",
    "engines",
    "judge",
    "judge_all",
    "print_json",
    "print_report",
    "shipped",
    "this_machine",
    "untested_versions",
]
