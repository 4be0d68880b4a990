"""What capturing costs, beside hooks and beside nothing: ``python -m benchmarks --help``."""
