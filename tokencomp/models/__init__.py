"""Model code that transformers lacks, built from its stock parts."""
