"""The passes over an output and the direct norm as kernels of their own; `layers/passes.py` chooses between them and PyTorch.

triton_kernels.py   the adapted output, its backward, the norm: one Triton kernel each
fastest.py          measure and dispatch: each shape once in every implementation
"""
