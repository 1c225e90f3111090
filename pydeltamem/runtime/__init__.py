"""What runs a model: the library and its signatures, engine, slots, texts, history, sampling, remote layers."""
