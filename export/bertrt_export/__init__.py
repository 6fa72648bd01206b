"""The exporter: checkpoints in, engine folders out, drift measured."""
