"""Where and how things run: device and precision, seed streams, the JSONL log, progress bars."""
