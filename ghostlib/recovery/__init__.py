"""Recovery: calibrate, solve and install in one call; gap after gap; or by a recipe that chooses.

In come the dense model, calibration windows and the layers to remove; out comes the repaired model,
whose ``config.recovery`` says what was done.
"""
