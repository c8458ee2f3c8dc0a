"""Statistics: additive float64 sums over tokens, which hold all that a closed form needs.

In come the streams of a model, in one pass for any set of boundaries; out come `Moments`, whose
memory does not grow with the number of tokens and which add up over batches and machines.
"""
