"""Triton kernels of the operators: the norm, the perturbation, the finite differences and the fused steps.

Installed as `crsam_ext.triton_kernels`. Empty so far: `available_backends()` tells which backends there are.
"""
