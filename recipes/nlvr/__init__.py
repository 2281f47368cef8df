"""Training of a tiny model on NLVR, first on drawn scenes with generated sentences."""
