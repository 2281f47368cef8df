"""ShapesQA, the procedural benchmark: scenes, questions, rendering."""
