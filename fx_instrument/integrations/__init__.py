"""One file a foreign engine or library; each imports its own and is imported by nothing else here."""
