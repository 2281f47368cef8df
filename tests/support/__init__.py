"""What the tests share: tiny models, oracles, plans and helpers. `pythonpath` in pyproject.toml
puts the folder `tests` on the import path."""
