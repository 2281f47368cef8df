"""A FastVLM of real weights, trained to answer questions about composed photographs."""
