"""One script per published number; run it as ``python -m benchmarks.<name>``."""
