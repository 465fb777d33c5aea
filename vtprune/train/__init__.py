"""Training of predictors: data, labels, one resumable loop. The model that a predictor is trained for stays frozen.

Importing this package is cheap; `accelerate` and the data sets are loaded by the functions that need them.
"""
