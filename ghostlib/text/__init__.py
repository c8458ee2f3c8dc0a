"""Text: named corpora, hub datasets, local files and the embedded assets.

In come a corpus' name or path and a tokenizer; out go documents (strings) and windows of tokens, a
LongTensor (windows, length). Here it is decided what is for training and what for testing.
"""
