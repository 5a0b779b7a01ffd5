"""The paper. Imports torch and nothing of ours above it.

Shape letters everywhere: T tokens (all leading dims flattened), I in, O out, R rank.
W_OI frozen weight, A_RI, B_OR low-rank factors, s scaling, m magnitude, n = |W + s·B·A|, g = m/n, w = |W|.
"""
