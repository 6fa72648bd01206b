"""The questions that an engine answers: one module each, functions of a `TaskContext`."""
