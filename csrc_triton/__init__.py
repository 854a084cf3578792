"""Triton kernels, each with its launcher right below it. One module (or package, where it is long) an op."""
