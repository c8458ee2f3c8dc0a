"""Linear algebra: Gram matrices with their factorisations, and Hadamard matrices.

Input: float64 matrices. Output: solutions, spectra and rotations. Independent of models.
"""
