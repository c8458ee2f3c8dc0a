"""Statistics: additive float64 sums over tokens, sufficient for every closed form.

Input: the streams of a model, in one pass for any set of boundaries. Output: `Moments`, whose
memory does not grow with the number of tokens and which add up over batches and machines.
"""
