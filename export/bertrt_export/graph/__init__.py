"""The graph is built from the weights, node by node, with the fused nodes already in place.

``emitter`` writes nodes and weights, ``products`` does matrix products in a precision, ``dialects`` says each
fused step in the operators of one dialect, ``model`` puts the layers and heads together, ``probe`` looks inside.
"""
