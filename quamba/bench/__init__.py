"""Latency, throughput, memory and energy of whole models, measured or predicted, and a table of them."""
