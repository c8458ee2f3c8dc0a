"""Text: named corpora, hub datasets, local files and the embedded assets.

Input: the name or path of a corpus, and a tokenizer. Output: documents (strings) and windows of
tokens, a LongTensor (windows, length). Documents are split into training and test here.
"""
