"""``python -m bertrt_bench.gpu``: everything that is measured on a machine with a GPU, in one run."""
