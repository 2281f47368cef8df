"""Small bugs that the tests should see. See README.md."""
