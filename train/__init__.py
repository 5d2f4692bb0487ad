"""The trainer of the PRX recipe; run from a checkout, on top of prx_model and prx_kernels."""
