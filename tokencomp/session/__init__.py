"""`tokencomp.Session`: a cached conversation, extended by media and text, limited by eviction."""
