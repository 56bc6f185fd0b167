"""Triton kernels of the operators: the norm, the perturbation, the finite differences and the fused steps.

Installed as `crsam_ext.triton_kernels`. Three layers, each in files of its own: `operators` checks tensors and makes
tables of their addresses, a launcher takes tables and numbers, and a kernel sees pointers only. Nothing here is
imported before the backend is first loaded, so that `import crsam_ext` does not import triton.
"""
