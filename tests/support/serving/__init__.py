"""Models, media, cases and clients for the tests of the servers."""
