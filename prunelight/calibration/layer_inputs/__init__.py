"""What reaches the weight matrices of a decoder layer, and its statistics."""
