"""Operators: the closed forms, from `Moments` to matrices, independent of models.

A `Family` is one record in one table; `solve` turns moments into an `Operator`; paths evaluate all
ridges or ranks with one decomposition.
"""
