"""Home of the @triton.jit kernels and their launchers, one folder an op; the ops run their torch algorithms until then."""
