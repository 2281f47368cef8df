"""Tiny multimodal models, trained from scratch on ShapesQA; `tokencomp.zoo` ships the results."""
