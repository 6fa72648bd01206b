"""``python -m bertrt_bench.cpu``: everything that is claimed about the native backend on a processor, in one run."""
