"""Triton kernels of the operators: the norm, the perturbation, the finite differences and the fused steps.

Installed as `crsam_ext.triton_kernels`. There are three layers. `operators` checks tensors and builds tables of their
addresses, launchers take tables and numbers, and kernels see only pointers. The package is imported when the backend
is first loaded, so `import crsam_ext` does not import triton.
"""
