"""One module per question; each writes one page."""
