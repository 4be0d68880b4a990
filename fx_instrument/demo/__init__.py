"""The library at work on a real model: SmolLM2-135M-Instruct from its PyPI wheel (``fx-instrument demo``)."""
