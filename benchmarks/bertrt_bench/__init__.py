"""Benchmarks: an engine and its rivals, in turns, on the same inputs."""
