"""Hooks against the rewritten graph: variants, workloads, and how they are measured."""
