"""Data made by models: what they are asked, the work over many items, rephrasing."""
