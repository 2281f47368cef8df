"""A cached conversation that media, text and evictions extend: `tokencomp.Session`."""
