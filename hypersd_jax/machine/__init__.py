"""The machine that a program runs on: what it offers, and whether it is ready. Every probe may fail by itself."""

from hypersd_jax.machine.report import inspect_machine as inspect_machine
from hypersd_jax.machine.text import report_lines as report_lines
