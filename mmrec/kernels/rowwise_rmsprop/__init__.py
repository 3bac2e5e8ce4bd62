"""The update of the rows of an embedding that a batch has read."""
