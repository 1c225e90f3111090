"""`python -m pydeltamem.cli` is `deltamem`."""

import sys

from .main import main

sys.exit(main())
