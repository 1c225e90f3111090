"""Sampling as transformers and vLLM do it: the temperature comes first, and not last as in llama.cpp."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt


def cooled_first(temperature: float, **options: Any) -> dict[str, Any]:
    """Sampling options of llama_cpp by which top-k, top-p and min-p look at the cooled distribution; 0: greedy."""
    if temperature <= 0 or temperature == 1:
        return {"temp": temperature, **options}
    return {"logits_processor": [functools.partial(_divided, np.float32(temperature))], "temp": 1.0, **options}


def _divided(temperature: np.float32, _: Any, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(logits / temperature)
