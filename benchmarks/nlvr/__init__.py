"""NLVR: sentences of people about drawn pictures, true or false. See README.md."""
