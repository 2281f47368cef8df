"""Training of the explainability-guided selector: labels, fit, training loop."""
