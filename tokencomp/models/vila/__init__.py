"""VILA and NVILA: config, processor and model, built from stock transformers parts."""
