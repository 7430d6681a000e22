"""What the system's speed and detection are worth, measured: each module writes one file of `benchmarks/results`."""
