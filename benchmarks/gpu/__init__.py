"""What capturing costs on a CUDA device: ``python -m benchmarks.gpu``."""
