"""Random inputs by Hypothesis: `make test` tries a few, always the same ones, `make fuzz` many, others each time."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis.configuration
from hypothesis import HealthCheck, Phase, settings

N_INPUTS = int(os.environ.get("DELTAMEM_FUZZ", "0"))  # per test; 0: the short run

hypothesis.configuration.set_hypothesis_home_dir(Path(__file__).resolve().parents[2] / "build" / "hypothesis")
settings.register_profile(
    "fuzz",
    max_examples=N_INPUTS or 100,
    derandomize=N_INPUTS == 0,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
    phases=[phase for phase in Phase if phase is not Phase.explain],
)
settings.load_profile("fuzz")
