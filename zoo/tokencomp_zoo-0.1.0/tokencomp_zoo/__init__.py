"""Tiny trained multimodal models and sample media, as data; `tokencomp.zoo` loads them."""
