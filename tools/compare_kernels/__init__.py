"""Compare builds of the native kernels: revisions, the working tree, other values of their constants."""
