"""Home of the @triton.jit kernels and launchers, one folder an op. None yet: the ops run their torch algorithms."""
