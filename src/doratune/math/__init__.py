"""The paper. Imports torch and nothing of ours above it.

Shape letters everywhere: T tokens (all leading dims flattened), I in, O out, R rank.
W_OI frozen weight, A_RI, B_OR low-rank factors, s scaling, m magnitude, n = |W + s·B·A|, g = m/n, w = |W|.

    dora.py             the line of Eq. 5, and forward and backward on plain tensors
    norm.py             n from W's norms and its products with A and B, without W + s·B·A
    decomposition.py    a weight as magnitude and direction; rows without direction
    autograd.py         a call with gradients, for eager mode
    compiled.py         the same for torch.compile and torch.export
    kernels/            Triton kernels, and which is faster for a shape
"""
