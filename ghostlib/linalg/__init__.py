"""Linear algebra: Gram matrices with their factorisations, and Hadamard matrices.

In come float64 matrices, out come solutions, spectra and rotations. Nothing here knows a model.
"""
