"""flash-linear-attention's models, read by name from its checkpoints and run by the operators here, on any device.

Configurations and tensor names are those of fla 0.6.0, which is never imported. A family is a file with its mixer; the
decoder, the softmax attention of hybrids, the MLP and the cache are shared. Importing quamba makes transformers know
them all.
"""
