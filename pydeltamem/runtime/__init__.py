"""What runs a model: the library and its signatures, slots, texts and their history, sampling, layers elsewhere."""
