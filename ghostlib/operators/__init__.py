"""Operators: the closed forms. A `Family` is one record in one table; `solve` turns moments into
an `Operator`; paths give every ridge or rank for the price of one decomposition.

In come `Moments`, out come matrices. Nothing here touches a model.
"""
