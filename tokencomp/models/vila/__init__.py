"""VILA and NVILA: configuration, processor and model, built from stock transformers parts."""
