"""Tutorial: helpers for the notebooks.

From the numbers a notebook measures, the paper's tables and stored results to claims with their
verdicts, and data frames.
"""
