"""What a memory costs: time and bytes, with an adapter and without."""
