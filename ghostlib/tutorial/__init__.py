"""Tutorial: what only the notebooks need.

In come the numbers a notebook measures, the paper's table and stored results; out come claims with
their verdicts, and data frames.
"""
