"""The stream file: records of raw bytes in, records of raw bytes out (numpy; nothing here knows torch)."""
