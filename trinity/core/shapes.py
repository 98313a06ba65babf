"""The one legend for the letters that variable names carry.

A name such as ``scores_TE`` is a tensor with one axis per letter, in that order.

====== ==================================================================
letter axis
====== ==================================================================
B      rows of a batch
S      positions of a row (sequence)
T      tokens of a microbatch, rows and positions flattened (T = B * S)
D      model width (``hidden_size``)
H      query heads
G      key/value heads (grouped-query attention)
d      width of one head
E      routed experts
K      experts chosen per token
R      routed rows, one per (token, chosen expert) pair (R = T * K)
F      feed-forward width, of one expert or of a dense layer
V      vocabulary entries
L      layers, or the mixture-of-experts layers among them
M, N   rows and columns of a weight matrix, stored (out, in)
P      patches of an image
====== ==================================================================

Units are spelled out where a number has one: ``_tokens``, ``_steps``, ``_rows``, ``_bytes``,
``_s`` (seconds). Counts of things are ``num_x``. Meshes have axes, tensors have dims.
"""
