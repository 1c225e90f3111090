"""What an adapter costs: time and bytes, with it and without."""
