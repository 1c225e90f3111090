"""Runs `make cuda-check` on a machine without a network, from the archive of `make cuda-bundle`.

    python3 run.py [--minutes 10] [-- CMake options]

Its arguments are those of tools/cuda_check.py. The wheels are unpacked into the folder of this file, and nothing else
is installed. The report is in build/cuda/report there, each step's result as soon as it is known.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SITE = ROOT / "site"


def lacking() -> str | None:
    """What this machine lacks, as a sentence; None if nothing."""
    python, machine = (ROOT / "PYTHON").read_text(encoding="utf-8").split()
    here = "{}.{}".format(*sys.version_info)
    if (here, platform.machine()) != (python, machine):
        return f"this archive is for Python {python} on {machine}, and this is {here} on {platform.machine()}"
    if missing := [name for name in ("torch", "numpy", "pip") if importlib.util.find_spec(name) is None]:
        return f"{sys.executable} has no {', no '.join(missing)}"
    if missing := [name for name in ("cmake", "ninja") if shutil.which(name) is None]:
        return f"no {', no '.join(missing)} is installed"
    return None


def main() -> int:
    if reason := lacking():
        print(f"run.py: {reason}")
        return 1
    if not SITE.exists():
        aside = ROOT / "site.new"
        shutil.rmtree(aside, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-warn-script-location"]
        subprocess.run([*pip, "--target", aside, *sorted((ROOT / "wheels").glob("*.whl"))], check=True)
        aside.rename(SITE)
    folders = [str(ROOT), str(ROOT / "tools"), str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, str(ROOT / "tools" / "cuda_check.py"), *sys.argv[1:]]
    return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
