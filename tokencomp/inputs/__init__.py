"""Media, prompts, question files and model loading: shared by evaluation, training and serving."""
