"""Training of a tiny model on NLVR, with drawn scenes and sentences in the style of its pictures."""
