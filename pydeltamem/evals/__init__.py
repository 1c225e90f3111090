"""What a memory recalls: one module a benchmark."""
