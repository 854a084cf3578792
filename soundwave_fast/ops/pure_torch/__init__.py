"""The ops' algorithms in plain torch: what runs on a CPU, and on any device without Triton. One module an op."""
