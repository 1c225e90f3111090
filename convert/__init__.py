"""PyTorch directories to GGUF (docs/reference/formats.md): published adapters (adapter.py) and base models (hf.py)."""
