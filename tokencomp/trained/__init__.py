"""Networks that reducers with weights use, and the files those weights live in."""
