"""Files: GGUF headers, adapters, packed models, PyTorch checkpoints, memories, and how a file is written as a whole."""
