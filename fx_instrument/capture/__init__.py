"""Run time: captured values on their way from the graph to the file, bounded and counted."""
