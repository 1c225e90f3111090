"""Published δ-mem checkpoints to adapter GGUF files (docs/reference/formats.md). Knows checkpoints, never llama.cpp.

checkpoint.py reads and checks a checkpoint, base.py what the base model is, pack.py turns the one into the other's
adapter, cli.py is `deltamem convert`.
"""
