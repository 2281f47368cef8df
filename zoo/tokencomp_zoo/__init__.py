"""Tiny trained multimodal models, sample media and ShapesQA; import them from `tokencomp.zoo`."""
