"""Long answers made of facts: what compression keeps of them, and where in the answer."""
