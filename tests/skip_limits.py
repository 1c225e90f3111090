"""Which tests may skip, and why. With `--strict-skips`, which CI sets, pytest fails at any other skip."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath

import pytest

# in which files tests may skip, by the beginning of the reason
ALLOWED = {
    "no CUDA device": ("test_cuda.py",),
    "no Vulkan device": ("test_vulkan.py",),
    "DELTAMEM_STOCK_LIB names no unpatched build": ("test_stock.py",),
    # `make fleet-tools` installs them
    "no PostgreSQL or HAProxy": ("test_fleet.py", "test_fleet_deploy.py", "test_fleet_store.py"),
    # `make test STRICT=1` allows it only where it cannot be installed
    "no headless browser": ("test_server_page.py", "test_server_page_kept.py"),
}


def is_allowed(file: str, reason: str) -> bool:
    return any(reason.startswith(beginning) and file in files for beginning, files in ALLOWED.items())


class Plugin:
    """Counts skips that are not allowed, and fails the run that has any."""

    def __init__(self) -> None:
        self.excess: Counter = Counter()

    def pytest_runtest_logreport(self, report) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            file = PurePath(report.nodeid.partition("::")[0]).name
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if not is_allowed(file, reason):
                self.excess[file, reason] += 1

    def pytest_collectreport(self, report) -> None:
        self.pytest_runtest_logreport(report)

    def pytest_sessionfinish(self, session) -> None:
        if self.excess and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.excess:
            terminalreporter.section("skips that are not allowed (tests/skip_limits.py)", red=True)
        for (file, reason), count in self.excess.items():
            terminalreporter.line(f"{file}: {count} skipped: {reason}")


def pytest_addoption(parser) -> None:
    parser.addoption("--strict-skips", action="store_true", help="fail where a test skips that need not")


def pytest_configure(config) -> None:
    if config.getoption("--strict-skips"):
        config.pluginmanager.register(Plugin())
