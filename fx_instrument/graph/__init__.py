"""Compile time: which modules are captured, and how their values leave the traced graph."""
