"""Ghosted Layers (arXiv 2605.15491): recover layer-pruned language models in closed form."""
