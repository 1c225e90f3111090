"""Which tests may skip, and how many. With `--strict-skips`, which CI sets, pytest fails at any other skip.

A fresh clone reaches these numbers. A machine with a GPU or an unpatched build skips fewer.
"""

from __future__ import annotations

from collections import Counter

import pytest

# how many may skip, by the beginning of the reason
ALLOWED = {
    "no CUDA device": 42,
    "no Vulkan device": 62,
    "DELTAMEM_STOCK_LIB names no unpatched build": 7,
    "no PostgreSQL or HAProxy": 22,  # `make fleet-tools` installs them
    "no headless browser": 11,  # `make test STRICT=1` allows it only where it cannot be installed
}


def excess(skipped: Counter) -> list[str]:
    """A line for each reason that is not allowed, or that more tests give than may."""
    lines = [
        f"{count} skipped, none may: {reason}"
        for reason, count in skipped.items()
        if not reason.startswith(tuple(ALLOWED))
    ]
    for allowed, limit in ALLOWED.items():
        count = sum(n for reason, n in skipped.items() if reason.startswith(allowed))
        if count > limit:
            lines.append(f"{count} skipped, {limit} may: {allowed}")
    return lines


class Plugin:
    """Counts skips, and fails the run that has too many."""

    def __init__(self) -> None:
        self.skipped: Counter = Counter()

    def pytest_runtest_logreport(self, report) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def pytest_collectreport(self, report) -> None:
        self.pytest_runtest_logreport(report)

    def pytest_sessionfinish(self, session) -> None:
        if excess(self.skipped) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        lines = excess(self.skipped)
        if lines:
            terminalreporter.section("skips that are not allowed (tests/skip_limits.py)", red=True)
        for line in lines:
            terminalreporter.line(line)


def pytest_addoption(parser) -> None:
    parser.addoption("--strict-skips", action="store_true", help="fail where a test skips that need not")


def pytest_configure(config) -> None:
    if config.getoption("--strict-skips"):
        config.pluginmanager.register(Plugin())
