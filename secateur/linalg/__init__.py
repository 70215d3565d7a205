"""Linear algebra on tensors, in float64: least squares, optimal brain surgeon, sparse
coding, rounding, masks. No function here knows what a layer or a model is.

May import ``utils``.
"""
