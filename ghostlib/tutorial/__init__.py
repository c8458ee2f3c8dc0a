"""Tutorial: what the notebooks need and the package does not.

In come what a notebook measured, and the names of stored or published results; out come entries of
the claims ledger, the page that collects them, and tables to compare with.
"""
