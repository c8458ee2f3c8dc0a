"""Selection: which layers to remove. A criterion is one record in one table.

In come the dense model, calibration windows and how many layers to remove; out comes a `Selection`,
with the scores that decided. Layers that cannot go are left out.
"""
